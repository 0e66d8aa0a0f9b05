// SPDX-License-Identifier: Apache-2.0

// Package authn authenticates requests: an [Authenticator] finds out which tailnet
// node accepted a request's connection, asks that node who the peer is, and decides
// which Kubernetes identity the request is forwarded with, or why it is refused.
//
// Nothing that a client writes is an input to that, except for what it may ask for
// (kubectl --as). All failures fail closed: without an identity there is no request.
package authn
