// SPDX-License-Identifier: Apache-2.0

// Package kubetest runs Kubernetes' own end-to-end tests against an API server and
// compares the results of two runs: one that calls the API server directly, and one that
// calls it through the plugin.
//
// The images that the tests run in pods are not Kubernetes' own. They are made of
// programs of the same Kubernetes module and of Debian packages.
package kubetest
