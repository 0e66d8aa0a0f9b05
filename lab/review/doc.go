// SPDX-License-Identifier: Apache-2.0

// Package review holds a test of the module's package of that name, which compares
// it with the API server's own code. That code needs more of the API server than
// should be among what users of the module build.
package review
