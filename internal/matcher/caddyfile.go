// SPDX-License-Identifier: Apache-2.0

package matcher

import (
	"slices"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// UnmarshalCaddyfile sets m from Caddyfile tokens. Syntax:
//
//	kubernetes {
//	    verb        <verb...>
//	    group       <pattern...>
//	    resource    <pattern...>
//	    subresource <pattern...>
//	    namespace   <pattern...>
//	    name        <pattern...>
//	    class       ordinary|interactive|ambiguous...
//	}
//
// At least one option has to be given. A repeated option adds its values.
func (m *Matcher) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the matcher's name
	if d.NextArg() {
		return d.Errf("unexpected argument %q: options go into a block", d.Val())
	}
	options := m.options()
	for d.NextBlock(0) {
		name := d.Val()
		i := slices.IndexFunc(options, func(o option) bool { return o.name == name })
		if i < 0 {
			return d.Errf("unknown option %q", name)
		}
		args := d.RemainingArgs()
		if len(args) == 0 {
			return d.Errf("%s has no value", name)
		}
		if d.NextBlock(d.Nesting()) {
			return d.Errf("%s takes no block", name)
		}
		*options[i].values = append(*options[i].values, args...)
	}
	// Caddy joins the segments of matchers with the same name in a set.
	if d.Next() {
		return d.Err("kubernetes is given twice: all have to match, so put the options into one block")
	}
	if err := m.Validate(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Matcher)(nil)
