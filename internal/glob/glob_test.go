// SPDX-License-Identifier: Apache-2.0

package glob_test

import (
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/glob"
)

func names(names ...string) []string { return names }

func TestMatch_WholeName(t *testing.T) {
	for _, tt := range []struct {
		pattern string
		yes, no []string
	}{
		{"a", names("a"), names("", "aa", "b", "A")},
		{"*", names("", "a", "a:b/c"), nil},
		{"a*", names("a", "ab", "a*"), names("ba", "")},
		{"*a", names("a", "ba"), names("ab")},
		{"a*a", names("aa", "aba"), names("a", "ab")},
		{"a*b*c", names("abc", "axbxc", "abbc"), names("ac", "acb", "abcd")},
		{"a*x*y*b", names("axyb", "a-x-y-b", "ayxyb"), names("ayxb", "ayb", "axb")},
		{"*b*", names("b", "abc"), names("ac")},
		{"a**c", names("ac", "abc"), names("a")},
		{"a?[b]", names("a?[b]"), names("axb", "ax[b]")},
	} {
		for _, name := range tt.yes {
			if !glob.Match(tt.pattern, name) {
				t.Errorf("%q does not match %q; want it to", tt.pattern, name)
			}
		}
		for _, name := range tt.no {
			if glob.Match(tt.pattern, name) {
				t.Errorf("%q matches %q; want it not to", tt.pattern, name)
			}
		}
	}
}

func TestAny_OnePatternSuffices(t *testing.T) {
	if !glob.Any(names("a", "b*"), "bc") {
		t.Error("the second pattern does not match; want it to")
	}
	if glob.Any(names("a", "b*"), "c") || glob.Any(nil, "") {
		t.Error("got a match without a pattern that matches")
	}
}
