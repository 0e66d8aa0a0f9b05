// SPDX-License-Identifier: Apache-2.0

package impersonate

import "context"

type identityKey struct{}

// NewContext returns a copy of ctx that carries id, which must not change any
// more. What sends a request to the API server takes the identity from there,
// where neither a client nor a config can reach it, and not from headers.
func NewContext(ctx context.Context, id *Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}

// FromContext returns the identity that ctx carries, and whether it carries one.
func FromContext(ctx context.Context) (*Identity, bool) {
	id, ok := ctx.Value(identityKey{}).(*Identity)
	if !ok || id == nil || id.User == "" {
		return nil, false
	}
	return id, true
}
