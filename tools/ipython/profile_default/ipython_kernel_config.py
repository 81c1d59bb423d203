"""Settings of the kernels that execute the examples."""

c = get_config()  # noqa: F821
# TensorFlow's C++ code writes about the machine's drivers to the terminal. That is no output of an example.
c.IPKernelApp.capture_fd_output = False
c.HistoryManager.enabled = False
c.InlineBackend.rc = {"figure.dpi": 130}
