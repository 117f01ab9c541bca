"""Pure array functions, one folder per operation. Nothing here imports `zoo`.

Import the operation from its folder: `from kernels.attention import attention`.
"""
