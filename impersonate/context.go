// SPDX-License-Identifier: Apache-2.0

package impersonate

import "context"

type identityKey struct{}

// Context is a context that carries an identity. What sends a request to the API
// server takes the identity from there, where neither a client nor a config can
// reach it, and not from headers.
type Context struct {
	context.Context
	// ID is the identity, which must not change any more.
	ID *Identity
}

// Value implements [context.Context].
func (c *Context) Value(key any) any {
	if key == (identityKey{}) {
		return c.ID
	}
	return c.Context.Value(key)
}

// NewContext returns a copy of ctx that carries id.
func NewContext(ctx context.Context, id *Identity) context.Context {
	return &Context{ctx, id}
}

// FromContext returns the identity that ctx carries, and whether it carries one.
func FromContext(ctx context.Context) (*Identity, bool) {
	id, ok := ctx.Value(identityKey{}).(*Identity)
	if !ok || id == nil || id.User == "" {
		return nil, false
	}
	return id, true
}
