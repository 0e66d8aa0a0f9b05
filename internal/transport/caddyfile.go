// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// UnmarshalCaddyfile sets t from Caddyfile tokens. Syntax:
//
//	transport kubernetes {
//	    in_cluster
//	    kubeconfig  <path> [<context>]
//	    credentials proxy|client
//	}
//
// At most one of in_cluster and kubeconfig may be given. Without either, and
// without the block, it is in_cluster where the pod's service account is present.
func (t *Transport) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the transport's name
	if d.NextArg() {
		return d.Errf("unexpected argument %q: options go into a block", d.Val())
	}
	for d.NextBlock(0) {
		known, err := t.UnmarshalOption(d)
		switch {
		case err != nil:
			return err
		case known:
		case d.Val() == "credentials":
			if t.Credentials != "" {
				return d.Err("credentials is given twice")
			}
			args := d.RemainingArgs()
			if len(args) != 1 || args[0] == "" || d.NextBlock(d.Nesting()) {
				return d.Errf("credentials takes one value, %s or %s", Proxy, Client)
			}
			t.Credentials = args[0]
		default:
			return d.Errf("unknown option %q", d.Val())
		}
	}
	if err := t.Validate(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

// UnmarshalCaddyfile sets u from Caddyfile tokens. Syntax:
//
//	dynamic kubernetes {
//	    in_cluster
//	    kubeconfig <path> [<context>]
//	}
//
// The options are those of transport kubernetes, which should be given the same.
func (u *Upstreams) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the source's name
	if d.NextArg() {
		return d.Errf("unexpected argument %q: options go into a block", d.Val())
	}
	for d.NextBlock(0) {
		known, err := u.UnmarshalOption(d)
		if err != nil {
			return err
		}
		if !known {
			return d.Errf("unknown option %q", d.Val())
		}
	}
	if err := u.Validate(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*Transport)(nil)
	_ caddyfile.Unmarshaler = (*Upstreams)(nil)
)
