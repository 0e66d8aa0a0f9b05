// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"net"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

func init() {
	caddy.RegisterModule(new(Upstreams))
}

// Upstreams is a source of upstreams for `reverse_proxy`: the address of the API
// server in a cluster configuration. It is read when the config is loaded, so that the
// JSON config does not contain an address from the machine that adapted it.
type Upstreams struct {
	Source

	// dial is the address of the API server.
	dial string
	// unusable says why there is none. Nil if there is one.
	unusable error
}

// CaddyModule returns the Caddy module information.
func (*Upstreams) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.upstreams.kubernetes",
		New: func() caddy.Module { return new(Upstreams) },
	}
}

// Provision reads the cluster configuration.
func (u *Upstreams) Provision(ctx caddy.Context) error {
	if err := u.Validate(); err != nil {
		return err
	}
	config, unusable, err := u.load(ctx.Logger())
	if err != nil || unusable != nil {
		u.unusable = unusable
		return err
	}
	base, err := config.base()
	if err != nil {
		return err
	}
	port := base.Port()
	if port == "" {
		port = "443"
	}
	u.dial = net.JoinHostPort(base.Hostname(), port)
	return nil
}

// GetUpstreams returns the address of the API server for any request. It returns a new
// upstream every time, because reverse_proxy writes to it.
func (u *Upstreams) GetUpstreams(*http.Request) ([]*reverseproxy.Upstream, error) {
	if u.unusable != nil {
		return nil, fmt.Errorf("no cluster: %w", u.unusable)
	}
	return []*reverseproxy.Upstream{{Dial: u.dial}}, nil
}

// Interface guards
var (
	_ caddy.Module                = (*Upstreams)(nil)
	_ caddy.Provisioner           = (*Upstreams)(nil)
	_ reverseproxy.UpstreamSource = (*Upstreams)(nil)
)
