// SPDX-License-Identifier: Apache-2.0

// Package impersonate decides which Kubernetes user and groups a tailnet peer
// is, and writes that into a request's headers.
//
// It depends on neither Caddy nor the network, so that it can be reviewed on its own.
// A peer comes from a WhoIs answer ([PeerFrom]). Its identity is a pure function of the
// peer ([Peer.Identity]) and of the limits of the cluster's operators ([Limits]).
// [Identity.SetHeaders] writes the identity into a request's headers, after
// [StripClient] and [StripProtected] have removed what a client may not set.
//
// # Threat model
//
// The API server believes the impersonation headers of a request because it trusts the
// proxy's credentials that come with it. A client that can add or remove one such header
// can act as any user, and a request with the credentials but without the headers acts
// as the proxy itself. Hence:
//
//   - Headers are removed by prefix and not by a list of names, as future versions of
//     Kubernetes may add more. Letter case, underscores and dots make no difference,
//     as proxies and servers fold them.
//   - Connection is rewritten, as a proxy deletes every header that it names.
//   - A name that a header does not carry unaltered is refused: HTTP trims blanks at
//     the ends, and servers reject other characters or read them differently.
//   - A user that starts with "system:" is refused, as people choose their own login
//     names on some control servers.
//   - All failures are errors with a zero [Identity]. There is no anonymous, default or
//     partial identity.
//
// docs/threat-model.md says who is trusted with what, and which part other packages
// have in it.
package impersonate
