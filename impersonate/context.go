// SPDX-License-Identifier: Apache-2.0

package impersonate

import "context"

type identityKey struct{}

// NewContext returns a copy of ctx that carries id. What sends a request to the
// API server takes the identity from there, where neither a client nor a config
// can reach it, and not from headers.
func NewContext(ctx context.Context, id Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}

// FromContext returns the identity that ctx carries, and whether it carries one.
func FromContext(ctx context.Context) (Identity, bool) {
	id, ok := ctx.Value(identityKey{}).(Identity)
	return id, ok && id.User != ""
}
