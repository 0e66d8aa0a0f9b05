// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"tailscale.com/tsnet"

	// Caddy's own modules, which the lab's Caddyfiles use.
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	// The plugin under test, with the storage in S3.
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/standin"
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/s3" // sites in tests store recordings in S3
)

// Caddy is the Caddy that runs in this process. A process can have only one.
type Caddy struct {
	lab *Lab
}

// Globals returns the global options of the lab's Caddyfiles, with further ones
// added. They keep everything inside the lab, and write the log to a file: the log
// named default would announce on standard error that it was redirected, so it is
// silenced. max_header_size is the API server's limit and not that of the examples, so that
// attacks with long values reach the plugin.
func (l *Lab) Globals(authKey string, further ...string) string {
	globals := fmt.Sprintf(`{
	admin off
	persist_config off
	skip_install_trust
	auto_https disable_redirects
	storage file_system %[1]s
	log default {
		level PANIC
	}
	log lab {
		output file %[2]s
		format json
		level INFO
	}
	tailscale {
		control_url %[3]s
		auth_key %[4]s
		state_dir %[5]s
	}
	servers {
		protocols h1 h2
		max_header_size 1MiB
		timeouts {
			write_idle 1h
		}
	}
`, filepath.Join(l.Dir, "caddy"), l.Log("caddy"), l.Headscale.URL(), authKey, filepath.Join(l.Dir, "nodes"))
	for _, option := range further {
		globals += indent(option) + "\n"
	}
	return globals + "}\n"
}

// startCaddy runs Caddy with a Caddyfile and waits until the proxy's node is on the
// tailnet.
func startCaddy(ctx context.Context, l *Lab, caddyfile string) (*Caddy, error) {
	c := &Caddy{lab: l}
	if err := c.Load(caddyfile); err != nil {
		return nil, fmt.Errorf("%w (log: %s)", err, l.Log("caddy"))
	}
	if _, err := c.Node(ctx, ProxyName); err != nil {
		return nil, errors.Join(fmt.Errorf("%w (log: %s)", err, l.Log("caddy")), c.Stop())
	}
	return c, nil
}

// Load makes Caddy run a Caddyfile in place of its current one.
func (c *Caddy) Load(caddyfile string) error {
	if err := os.WriteFile(filepath.Join(c.lab.Dir, "Caddyfile"), []byte(caddyfile), 0o600); err != nil {
		return err
	}
	adapted, err := Adapt(caddyfile)
	if err != nil {
		return err
	}
	return caddy.Load(adapted, true)
}

// Adapt returns the JSON of a Caddyfile. Warnings are errors.
func Adapt(caddyfile string) ([]byte, error) {
	adapted, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return nil, fmt.Errorf("adapting the Caddyfile: %w", err)
	}
	for _, w := range warnings {
		// Formatting does not matter here.
		if w.Message != "Caddyfile input is not formatted; run 'caddy fmt --overwrite' to fix inconsistencies" {
			return nil, fmt.Errorf("adapting the Caddyfile: %s", w)
		}
	}
	return adapted, nil
}

// Node waits until Caddy's tailnet node of that name is connected, and returns it.
func (c *Caddy) Node(ctx context.Context, name string) (*tsnet.Server, error) {
	node, ok := standin.Node(name)
	if !ok {
		return nil, fmt.Errorf("caddy has no tailnet node %q", name)
	}
	if _, err := node.Up(ctx); err != nil {
		return nil, fmt.Errorf("tailnet node %q: %w", name, err)
	}
	return node, nil
}

// CA returns the root certificate of `tls internal`.
func (c *Caddy) CA() ([]byte, error) {
	return os.ReadFile(filepath.Join(c.lab.Dir, "caddy", "pki", "authorities", "local", "root.crt"))
}

// Stop stops Caddy and the tailnet nodes that it listens on.
func (c *Caddy) Stop() error { return caddy.Stop() }
