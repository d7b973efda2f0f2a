"""Top floor: everything a person starts. The command `mdm` is `mdm.tools.main`; each verb is a module here.

The shell scripts beside this file (`tools/demo`, `tools/test`, ...) serve a checkout and are not part of the
package.
"""
