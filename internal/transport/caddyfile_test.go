// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// The Caddyfile has the options of the JSON config, and refuses others.
func TestUnmarshalCaddyfile(t *testing.T) {
	for _, tt := range []struct {
		input   string
		want    Transport
		wantErr string
	}{
		{"kubernetes", Transport{}, ""},
		{"kubernetes {\nin_cluster\n}", Transport{Source: Source{InCluster: true}}, ""},
		{"kubernetes {\nkubeconfig /a/b\n}", Transport{Source: Source{Kubeconfig: "/a/b"}}, ""},
		{"kubernetes {\nkubeconfig /a/b c\n}", Transport{Source: Source{Kubeconfig: "/a/b", Context: "c"}}, ""},

		{"kubernetes x", Transport{}, `unexpected argument "x"`},
		{"kubernetes {\ntls_insecure_skip_verify\n}", Transport{}, `unknown option "tls_insecure_skip_verify"`},
		{"kubernetes {\nin_cluster\nin_cluster\n}", Transport{}, "in_cluster is given twice"},
		{"kubernetes {\nin_cluster x\n}", Transport{}, `unexpected argument "x" after in_cluster`},
		{"kubernetes {\nin_cluster {\nx\n}\n}", Transport{}, "in_cluster takes no block"},
		{"kubernetes {\nkubeconfig\n}", Transport{}, "kubeconfig has no path"},
		{"kubernetes {\nkubeconfig \"\"\n}", Transport{}, "kubeconfig has no path"},
		{"kubernetes {\nkubeconfig a b c\n}", Transport{}, `unexpected argument "c" after kubeconfig`},
		{"kubernetes {\nkubeconfig a\nkubeconfig b\n}", Transport{}, "kubeconfig is given twice"},
		{"kubernetes {\nin_cluster\nkubeconfig a\n}", Transport{}, "exclude each other"},
	} {
		t.Run(tt.input, func(t *testing.T) {
			var got Transport
			err := got.UnmarshalCaddyfile(caddyfile.NewTestDispenser(tt.input))
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("got error %v; want one with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.InCluster != tt.want.InCluster || got.Kubeconfig != tt.want.Kubeconfig || got.Context != tt.want.Context {
				t.Errorf("got %+v; want %+v", &got, &tt.want)
			}
		})
	}
}
