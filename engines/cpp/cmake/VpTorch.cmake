# libtorch from torch's wheel: VP_TORCH_FOUND, VP_TORCH_INCLUDE, VP_TORCH_LIB, VP_TORCH_LIBRARIES, VP_TORCH_CXX11_ABI.
#
# Not find_package(Torch): the usual wheel is a CUDA build, whose package file requires the CUDA toolkit, though running
# a package needs neither its compiler nor its headers.
set(VP_TORCH_FOUND FALSE)
if(VP_ENGINE_AOTI)
  if(NOT VP_TORCH_ROOT)
    find_package(Python3 COMPONENTS Interpreter)
    if(Python3_FOUND)
      # Locate torch without importing it, which takes seconds.
      execute_process(
        COMMAND "${Python3_EXECUTABLE}" -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '', end='')"
        OUTPUT_VARIABLE found ERROR_QUIET)
    endif()
    set(VP_TORCH_ROOT "${found}" CACHE PATH "Folder of the torch package (holds include/ and lib/)" FORCE)
  endif()
  set(VP_TORCH_INCLUDE "${VP_TORCH_ROOT}/include")
  set(VP_TORCH_LIB "${VP_TORCH_ROOT}/lib")
  set(VP_TORCH_LIBRARIES "${VP_TORCH_LIB}/libtorch.so" "${VP_TORCH_LIB}/libtorch_cpu.so" "${VP_TORCH_LIB}/libc10.so")
  if(EXISTS "${VP_TORCH_INCLUDE}/torch/csrc/inductor/aoti_package/model_package_loader.h" AND
     EXISTS "${VP_TORCH_INCLUDE}/torch/headeronly/version.h" AND EXISTS "${VP_TORCH_LIB}/libtorch_cpu.so")
    set(VP_TORCH_FOUND TRUE)
    # Wheels before 2.6 use the old ABI of std::string.
    set(VP_TORCH_CXX11_ABI 1)
    file(STRINGS "${VP_TORCH_ROOT}/share/cmake/Torch/TorchConfig.cmake" old_abi REGEX "_GLIBCXX_USE_CXX11_ABI=0")
    if(old_abi)
      set(VP_TORCH_CXX11_ABI 0)
    endif()
    list(APPEND VP_ENGINE_BACKENDS aoti)
  elseif(NOT VP_ENGINE_AOTI STREQUAL "AUTO")
    message(FATAL_ERROR "no torch with AOTInductor's C++ loader at '${VP_TORCH_ROOT}'; expected an installed torch 2.9 or "
      "newer; pass -DPython3_EXECUTABLE=<a Python that has it> or -DVP_TORCH_ROOT=<its folder>, or -DVP_ENGINE_AOTI=OFF")
  endif()
endif()
if(VP_TORCH_FOUND)
  message(STATUS "vp_engine: aoti bundles by ${VP_TORCH_ROOT}")
else()
  message(STATUS "vp_engine: no torch, so aoti bundles are verified and described but not run")
endif()
