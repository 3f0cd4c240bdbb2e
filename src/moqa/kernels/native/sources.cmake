# The kernels without Python: a library that the extension and the sanitizers' driver link.
add_library(moqa_kernels STATIC
  ${CMAKE_CURRENT_LIST_DIR}/decoder.cpp
  ${CMAKE_CURRENT_LIST_DIR}/ops.cpp
  ${CMAKE_CURRENT_LIST_DIR}/patch.cpp
  ${CMAKE_CURRENT_LIST_DIR}/pool.cpp
  ${CMAKE_CURRENT_LIST_DIR}/path.cpp
  ${CMAKE_CURRENT_LIST_DIR}/path_portable.cpp
  ${CMAKE_CURRENT_LIST_DIR}/solve.cpp)
set_target_properties(moqa_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON
                      CXX_VISIBILITY_PRESET hidden)
target_include_directories(moqa_kernels PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(moqa_kernels PUBLIC Threads::Threads)
# errno and traps would keep loops from becoming vectors
target_compile_options(moqa_kernels PRIVATE -O3 -Wall -Wextra -fno-math-errno -fno-trapping-math -Wno-psabi
  $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  target_sources(moqa_kernels PRIVATE ${CMAKE_CURRENT_LIST_DIR}/path_avx512vbmi.cpp
                 ${CMAKE_CURRENT_LIST_DIR}/path_avx512.cpp ${CMAKE_CURRENT_LIST_DIR}/path_avx2.cpp)
  target_compile_definitions(moqa_kernels PRIVATE MOQA_X86)
  set(AVX512 "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx512vnni;-mfma;-mf16c;-mprefer-vector-width=512")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/path_avx512vbmi.cpp PROPERTIES COMPILE_OPTIONS
                              "${AVX512};-mavx512vbmi")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/path_avx512.cpp PROPERTIES COMPILE_OPTIONS "${AVX512}")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/path_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
endif()
