// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

func TestContext_CarriesIdentity(t *testing.T) {
	want := &impersonate.Identity{User: "alice@example.com", Groups: []string{"tailnet-readers"}, Source: impersonate.SourceGrants}
	ctx := impersonate.NewContext(t.Context(), want)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	got, ok := impersonate.FromContext(ctx)
	if !ok {
		t.Fatal("got no identity; want one")
	}
	type other struct{}
	if got := impersonate.NewContext(context.WithValue(t.Context(), other{}, "kept"), want).Value(other{}); got != "kept" {
		t.Errorf("under another key, got %v; want what the context had", got)
	}
	if diff := cmp.Diff(want, got, equateAddrs); diff != "" {
		t.Errorf("identity (-want +got):\n%s", diff)
	}
}

func TestFromContext_NoIdentity(t *testing.T) {
	for _, ctx := range []context.Context{t.Context(), impersonate.NewContext(t.Context(), nil)} {
		if id, ok := impersonate.FromContext(ctx); ok {
			t.Errorf("got identity %+v; want none", id)
		}
	}
}

func TestFromContext_IdentityWithoutUserIsNone(t *testing.T) {
	ctx := impersonate.NewContext(t.Context(), &impersonate.Identity{Groups: []string{"system:masters"}})
	if id, ok := impersonate.FromContext(ctx); ok {
		t.Errorf("got identity %+v; want none", id)
	}
}
