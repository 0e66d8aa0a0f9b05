// SPDX-License-Identifier: Apache-2.0

// Package accessreview tests the plugin's package accessreview against the API server's
// own code. That code has more dependencies than the plugin's module should have.
package accessreview
