// What the library was compiled for, as setup_kernels.py has it: kernels.py looks for this text in the file.

extern "C" __attribute__((used, visibility("default"))) const char* const lmi_multi_archs =
    "lmi_multi is compiled for " LMI_ARCHS;
