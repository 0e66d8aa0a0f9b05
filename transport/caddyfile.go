// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// UnmarshalCaddyfile sets t from Caddyfile tokens. Syntax:
//
//	transport kubernetes {
//	    in_cluster
//	    kubeconfig <path> [<context>]
//	}
//
// At most one of the options may be given. Without any, and without the block,
// it is in_cluster where the pod's service account is present.
func (t *Transport) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the transport's name
	if d.NextArg() {
		return d.Errf("unexpected argument %q: options go into a block", d.Val())
	}
	for d.NextBlock(0) {
		option := d.Val()
		args := d.RemainingArgs()
		switch option {
		case "in_cluster":
			if t.InCluster {
				return d.Errf("%s is given twice", option)
			}
			if len(args) > 0 {
				return d.Errf("unexpected argument %q after %s", args[0], option)
			}
			t.InCluster = true
		case "kubeconfig":
			if t.Kubeconfig != "" {
				return d.Errf("%s is given twice", option)
			}
			if len(args) == 0 || args[0] == "" {
				return d.Errf("%s has no path", option)
			}
			if len(args) > 2 {
				return d.Errf("unexpected argument %q after %s", args[2], option)
			}
			t.Kubeconfig = args[0]
			if len(args) == 2 {
				t.Context = args[1]
			}
		default:
			return d.Errf("unknown option %q", option)
		}
		if d.NextBlock(d.Nesting()) {
			return d.Errf("%s takes no block", option)
		}
	}
	if err := t.validate(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Transport)(nil)
