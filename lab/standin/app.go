// SPDX-License-Identifier: Apache-2.0

// Package standin is the lab's stand-in for the caddy-tailscale plugin
// (github.com/tailscale/caddy-tailscale), written from its documented contract;
// never shipped.
//
// The lab cannot use the real plugin as a Go module, but its Caddyfiles have to be
// those that users write. So this package registers what such a Caddyfile needs: the
// tailscale app with its global option, and the networks for "bind
// tailscale/<node>". It lacks the plugin's proxy transport, authentication provider
// and subcommand. It is not meant to be used outside the lab.
//
// Configs that name the same node share it and its listeners, because Caddy starts a
// new config before it stops the old one.
package standin

import (
	"fmt"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"go.uber.org/zap"
)

func init() {
	caddy.RegisterModule(App{})
	httpcaddyfile.RegisterGlobalOption("tailscale", parseGlobalOption)
}

// App holds the settings of tailnet nodes. It starts none: the first listener of a
// node starts it, and the last one stops it.
//
// Strings may hold global placeholders such as {env.TS_AUTHKEY}.
type App struct {
	// The auth key of nodes. Default: the environment's TS_AUTHKEY.
	AuthKey string `json:"auth_key,omitempty"`

	// The control server. Default: Tailscale's.
	ControlURL string `json:"control_url,omitempty"`

	// Whether the control server removes nodes when they disconnect. Default: false.
	Ephemeral bool `json:"ephemeral,omitempty"`

	// The folder for state. Each node has a folder of its name in it. Default: one
	// inside the user's configuration folder.
	StateDir string `json:"state_dir,omitempty"`

	// The tags that nodes request. Default: none.
	Tags []string `json:"tags,omitempty"`

	// Whether nodes serve Tailscale's web interface to the tailnet.
	// Default: false.
	WebUI bool `json:"webui,omitempty"`

	// Settings of single nodes, by the name in "bind tailscale/<name>". They
	// override the settings above.
	Nodes map[string]*NodeConfig `json:"nodes,omitempty"`

	// Only the stand-in has this option. If true, closing a node never returns, as may
	// happen to the real plugin's nodes that have had many connections. Default: false.
	HangOnClose bool `json:"hang_on_close,omitempty"`

	logger *zap.Logger
}

// NodeConfig holds the settings of one node.
type NodeConfig struct {
	// The auth key of this node. Default: the app's.
	AuthKey string `json:"auth_key,omitempty"`

	// The control server of this node. Default: the app's.
	ControlURL string `json:"control_url,omitempty"`

	// Whether this node is removed when it disconnects. Default: the app's.
	Ephemeral *bool `json:"ephemeral,omitempty"`

	// The hostname that this node requests. Default: the node's name in the config,
	// or the name of the program if that is empty, as in "bind tailscale/".
	Hostname string `json:"hostname,omitempty"`

	// The UDP port for WireGuard. Default: a free one.
	Port uint16 `json:"port,omitempty"`

	// The folder for this node's state. Default: see the app's.
	StateDir string `json:"state_dir,omitempty"`

	// The tags that this node requests. Default: the app's.
	Tags []string `json:"tags,omitempty"`

	// Whether this node serves Tailscale's web interface. Default: the app's.
	WebUI *bool `json:"webui,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "tailscale",
		New: func() caddy.Module { return new(App) },
	}
}

// Provision stores the app's logger.
func (a *App) Provision(ctx caddy.Context) error {
	a.logger = ctx.Logger()
	return nil
}

// Start does nothing: listeners start nodes.
func (a *App) Start() error { return nil }

// Stop does nothing: the last listener of a node stops it.
func (a *App) Stop() error { return nil }

func parseGlobalOption(d *caddyfile.Dispenser, existing any) (any, error) {
	if existing != nil {
		return nil, d.Err("repeated global option 'tailscale'")
	}
	app := new(App)
	if err := app.UnmarshalCaddyfile(d); err != nil {
		return nil, err
	}
	return httpcaddyfile.App{Name: "tailscale", Value: caddyconfig.JSON(app, nil)}, nil
}

// UnmarshalCaddyfile parses the global option:
//
//	tailscale {
//		auth_key      <key>
//		control_url   <url>
//		ephemeral     [true|false]
//		hang_on_close [true|false]
//		state_dir     <path>
//		tags          <tag...>
//		webui         [true|false]
//		<node> {
//			auth_key    <key>
//			control_url <url>
//			ephemeral   [true|false]
//			hostname    <name>
//			port        <port>
//			state_dir   <path>
//			tags        <tag...>
//			webui       [true|false]
//		}
//	}
func (a *App) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the option's own name
	if d.NextArg() {
		return d.Errf("unexpected '%s' after 'tailscale'", d.Val())
	}
	seen := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		if seen[name] {
			return d.Errf("repeated '%s' in tailscale", name)
		}
		seen[name] = true

		var err error
		switch name {
		case "auth_key":
			a.AuthKey, err = value(d)
		case "control_url":
			a.ControlURL, err = value(d)
		case "ephemeral":
			a.Ephemeral, err = flag(d)
		case "hang_on_close":
			a.HangOnClose, err = flag(d)
		case "state_dir":
			a.StateDir, err = value(d)
		case "tags":
			a.Tags, err = values(d)
		case "webui":
			a.WebUI, err = flag(d)
		default:
			err = a.unmarshalNode(d)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unmarshalNode parses a node's block; d is on the node's name.
func (a *App) unmarshalNode(d *caddyfile.Dispenser) error {
	name := d.Val()
	if d.NextArg() {
		return d.Errf("unrecognized tailscale option '%s'", name)
	}
	node := new(NodeConfig)
	seen := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		if seen[option] {
			return d.Errf("repeated '%s' in tailscale node '%s'", option, name)
		}
		seen[option] = true

		var err error
		switch option {
		case "auth_key":
			node.AuthKey, err = value(d)
		case "control_url":
			node.ControlURL, err = value(d)
		case "ephemeral":
			node.Ephemeral, err = flagPtr(d)
		case "hostname":
			node.Hostname, err = value(d)
		case "port":
			node.Port, err = port(d)
		case "state_dir":
			node.StateDir, err = value(d)
		case "tags":
			node.Tags, err = values(d)
		case "webui":
			node.WebUI, err = flagPtr(d)
		default:
			err = d.Errf("unrecognized option '%s' in tailscale node '%s'", option, name)
		}
		if err != nil {
			return err
		}
	}
	// After an empty block, the dispenser is on the closing brace. Without a block
	// it is on the name, which then is a misspelt option.
	if d.Val() != "}" {
		return d.Errf("unrecognized tailscale option '%s' (a node has a block)", name)
	}
	if a.Nodes == nil {
		a.Nodes = make(map[string]*NodeConfig)
	}
	a.Nodes[name] = node
	return nil
}

// value parses the only argument of the current option.
func value(d *caddyfile.Dispenser) (string, error) {
	args, err := values(d)
	if err != nil {
		return "", err
	}
	if len(args) > 1 {
		return "", d.Errf("unexpected '%s' after the value", args[1])
	}
	return args[0], nil
}

// values parses the arguments of the current option, at least one.
func values(d *caddyfile.Dispenser) ([]string, error) {
	option := d.Val()
	args := d.RemainingArgs()
	if len(args) == 0 {
		return nil, d.Errf("missing value for '%s'", option)
	}
	return args, nil
}

// flag parses the optional true or false of the current option. Without an argument,
// the option means true.
func flag(d *caddyfile.Dispenser) (bool, error) {
	option := d.Val()
	args := d.RemainingArgs()
	switch {
	case len(args) == 0:
		return true, nil
	case len(args) > 1:
		return false, d.Errf("unexpected '%s' after '%s %s'", args[1], option, args[0])
	case args[0] != "true" && args[0] != "false":
		return false, d.Errf("'%s' is either true or false, not '%s'", option, args[0])
	}
	return args[0] == "true", nil
}

func flagPtr(d *caddyfile.Dispenser) (*bool, error) {
	on, err := flag(d)
	return &on, err
}

func port(d *caddyfile.Dispenser) (uint16, error) {
	text, err := value(d)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0, d.WrapErr(fmt.Errorf("port '%s': %w", text, err))
	}
	return uint16(n), nil
}

// Interface guards
var (
	_ caddy.App             = (*App)(nil)
	_ caddy.Provisioner     = (*App)(nil)
	_ caddyfile.Unmarshaler = (*App)(nil)
)
