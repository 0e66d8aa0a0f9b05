// SPDX-License-Identifier: Apache-2.0

// Package impersonate decides which Kubernetes user and groups a tailnet peer
// is, and writes that into a request's headers.
//
// It is the part that has to be right, so it is kept apart from Caddy and from
// the network: what a peer is arrives as a WhoIs answer ([PeerFrom]), what it may
// be called is a pure function of that ([Peer.Identity]), and what reaches the
// API server is written by [Identity.SetHeaders] onto headers from which
// everything a client could have said has been removed ([StripClient],
// [StripProtected]).
//
// # Threat model
//
// The API server believes the impersonation headers of a request because it
// trusts the credentials that come with it: the proxy's. A client that can add
// one header, or make one of ours disappear, is therefore anybody it likes, and
// a request that arrives with the credentials and without the headers is the
// proxy itself. Hence:
//
//   - Headers are removed by prefix, not from a list: one that Kubernetes invents
//     next year is as dangerous as one we know. Letter case, underscores and dots
//     make no difference, since proxies and servers fold them.
//   - Connection is rewritten, because a proxy deletes every header that it names.
//   - A name that a header cannot carry unaltered is no identity: blanks at the
//     ends are trimmed on the wire, and other characters are rejected or read
//     differently further on.
//   - A user that starts with "system:" is refused: on some control servers people
//     choose their own login names.
//   - Everything that is in doubt is an error with a zero [Identity]. There is no
//     anonymous, no default and no partial identity.
//
// The tailnet's control server is trusted to say who owns a device, and whoever
// edits its policy file to say what is granted: between them they can be anybody in
// the cluster. They are not trusted with names that are the cluster's own, nor to
// know what a header carries. A tailnet whose devices were shared into this one is
// trusted to say who owns them, but not to tag them. The client is trusted to hold
// its device's key, and in nothing that it sends.
//
// That the answer is about the peer at the other end of the connection, and not too
// old, is for packages tailnet and cache to see to; that credentials go nowhere
// without an identity, for package transport. What the caller does with the rights
// that it has is RBAC's to judge. SECURITY.md says all of it, and how to report a hole.
package impersonate
