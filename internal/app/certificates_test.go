// SPDX-License-Identifier: Apache-2.0

package app

import (
	"encoding/json"
	"os"
	"slices"
	"testing"

	"github.com/caddyserver/caddy/v2"

	// The apps of the configs.
	_ "github.com/caddyserver/caddy/v2/modules/caddyevents"
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"
)

// Caddy decides which sites get their certificates from Tailscale.
func TestTailscaleNames_ThoseThatCaddyAsksFor(t *testing.T) {
	type object = map[string]any
	site := func(name string) object {
		return object{"match": []object{{"host": []string{name}}}, "handle": []object{}}
	}
	// Not the test's own folder: Caddy may still write to it when it has stopped.
	folder, err := os.MkdirTemp("", "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(folder) }()
	config, err := json.Marshal(object{
		"admin":   object{"disabled": true},
		"storage": object{"module": "file_system", "root": folder},
		"apps": object{
			name:  object{},
			"pki": object{"certificate_authorities": object{"local": object{"install_trust": false}}},
			"http": object{"servers": object{"main": object{
				"listen":          []string{"127.0.0.1:0"},
				"automatic_https": object{"disable_redirects": true},
				"routes":          []object{site("k8s.example.ts.net"), site("own.example.ts.net"), site("localhost")},
			}}},
			"tls": object{"automation": object{"policies": []object{
				{"subjects": []string{"own.example.ts.net"}, "issuers": []object{{"module": "internal"}}},
				{"subjects": []string{"k8s.example.com"}, "get_certificate": []object{{"via": "tailscale"}}},
			}}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	}()
	got := tailscaleNames(caddy.ActiveContext())
	slices.Sort(got)
	if want := []string{"k8s.example.com", "k8s.example.ts.net"}; !slices.Equal(got, want) {
		t.Errorf("got %q; want %q", got, want)
	}
}
