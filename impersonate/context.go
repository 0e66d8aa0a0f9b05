// SPDX-License-Identifier: Apache-2.0

package impersonate

import "context"

type identityKey struct{}

// Context is a context that carries an identity. The transport takes the identity from
// there and not from headers, as neither a client nor a config can change it there.
type Context struct {
	context.Context
	// ID is the identity. It must not be modified.
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

// FromContext returns the identity that ctx carries, and whether it carries one. It
// ignores identities without a user.
func FromContext(ctx context.Context) (*Identity, bool) {
	id, ok := ctx.Value(identityKey{}).(*Identity)
	if !ok || id == nil || id.User == "" {
		return nil, false
	}
	return id, true
}
