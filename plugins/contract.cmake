# The contract is written down once, in Python: ${contract} is what contract.py prints of it for C++.
find_package(Python COMPONENTS Interpreter REQUIRED)
set(contract ${CMAKE_CURRENT_BINARY_DIR}/contract.h)
add_custom_command(
  OUTPUT ${contract}
  COMMAND ${CMAKE_COMMAND} -E env PYTHONIOENCODING=utf-8 ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/contract.py > ${contract}
  DEPENDS ${CMAKE_CURRENT_LIST_DIR}/contract.py
  VERBATIM)
