// SPDX-License-Identifier: Apache-2.0

package standin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"tailscale.com/tsnet"
)

// upTimeout is how long a listener waits for the node's address.
const upTimeout = time.Minute

// nodes holds the nodes that configs share, by name.
var nodes = caddy.NewUsagePool()

// Node returns the running node of that name, and false if no listener uses one.
func Node(name string) (*tsnet.Server, bool) {
	var found *tsnet.Server
	nodes.Range(func(key, value any) bool {
		if key == name {
			found = value.(*node).server
			return false
		}
		return true
	})
	return found, found != nil
}

// node is a running tsnet node. Its settings are those of the config that started
// it: a reload that changes them takes effect only after its last listener was
// closed.
type node struct {
	name   string
	server *tsnet.Server
	hang   bool                       // see App.HangOnClose
	logger atomic.Pointer[zap.Logger] // the newest config's
}

// acquireNode starts the node or adds a use of the running one.
func acquireNode(app *App, name string) (*node, error) {
	value, loaded, err := nodes.LoadOrNew(name, func() (caddy.Destructor, error) { return startNode(app, name) })
	if err != nil {
		return nil, err
	}
	n := value.(*node)
	if loaded {
		n.logger.Store(app.logger)
	}
	return n, nil
}

// release releases one use of the node and stops it if that was the last.
func (n *node) release() error {
	_, err := nodes.Delete(n.name)
	return err
}

// Destruct stops the node. As with the real plugin, that can take for ever: tsnet 1.102
// resets each connection of a node that it closes into a queue that has no reader left.
func (n *node) Destruct() error {
	if n.hang {
		select {}
	}
	if err := n.server.Close(); err != nil {
		return fmt.Errorf("stopping tailnet node %q: %w", n.name, err)
	}
	return nil
}

func startNode(app *App, name string) (*node, error) {
	server, err := app.server(name)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(server.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("state of tailnet node %q: %w", name, err)
	}
	n := &node{name: name, server: server, hang: app.HangOnClose}
	n.logger.Store(app.logger)
	server.Logf = func(format string, args ...any) {
		n.logger.Load().Sugar().With("node", name).Debugf(format, args...)
	}
	server.UserLogf = func(format string, args ...any) {
		n.logger.Load().Sugar().With("node", name).Infof(format, args...)
	}
	// A server whose start failed has nothing left to close.
	if err := server.Start(); err != nil {
		return nil, fmt.Errorf("starting tailnet node %q: %w", name, err)
	}
	return n, nil
}

// ipv4 waits until the node has joined its tailnet and returns its IPv4 address.
func (n *node) ipv4(ctx context.Context) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, upTimeout)
	defer cancel()
	status, err := n.server.Up(ctx)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("tailnet node %q did not join: %w", n.name, err)
	}
	for _, ip := range status.TailscaleIPs {
		if ip.Is4() {
			return ip, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("tailnet node %q has no IPv4 address, only %v", n.name, status.TailscaleIPs)
}

// server returns the configured node of that name, not started.
func (a *App) server(name string) (*tsnet.Server, error) {
	settings := a.Nodes[name]
	if settings == nil {
		settings = new(NodeConfig)
	}
	s := &tsnet.Server{
		Ephemeral:    a.Ephemeral,
		RunWebClient: a.WebUI,
		Port:         settings.Port,
	}
	if settings.Ephemeral != nil {
		s.Ephemeral = *settings.Ephemeral
	}
	if settings.WebUI != nil {
		s.RunWebClient = *settings.WebUI
	}

	var errs []error
	repl := caddy.NewReplacer()
	expand := func(option, text string) string {
		expanded, err := repl.ReplaceOrErr(text, true, true)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", option, err))
		}
		return expanded
	}
	first := func(option string, texts ...string) string {
		for _, text := range texts {
			if text = expand(option, text); text != "" {
				return text
			}
		}
		return ""
	}
	s.AuthKey = cmp.Or(first("auth_key", settings.AuthKey, a.AuthKey), os.Getenv("TS_AUTHKEY"))
	s.ControlURL = first("control_url", settings.ControlURL, a.ControlURL)
	s.Hostname = first("hostname", settings.Hostname, name)
	s.Dir = first("state_dir", settings.StateDir)
	if s.Dir == "" {
		if parent := first("state_dir", a.StateDir); parent != "" {
			s.Dir = filepath.Join(parent, name)
		}
	}
	if s.Dir == "" {
		configDir, err := os.UserConfigDir()
		if err != nil {
			errs = append(errs, fmt.Errorf("state_dir: %w", err))
		}
		s.Dir = filepath.Join(configDir, "caddy-tailscale-standin", name)
	}
	tags := settings.Tags
	if tags == nil {
		tags = a.Tags
	}
	for _, tag := range tags {
		s.AdvertiseTags = append(s.AdvertiseTags, expand("tags", tag))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("settings of tailnet node %q: %w", name, err)
	}
	return s, nil
}
