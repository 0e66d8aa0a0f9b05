// SPDX-License-Identifier: Apache-2.0

// Package recorder adds a session recorder to the lab's tailnet. It is not
// Tailscale's tsrecorder, but Tailscale's own client can talk to it, in both
// versions of the protocol.
package recorder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/tailscale/hujson"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

const (
	name = "recorder"
	tag  = "tag:recorder"
)

// Recorder is a session recorder on a tailnet.
type Recorder struct {
	*recordertest.Recorder
	// Addr is its address.
	Addr netip.AddrPort

	node   *tsnet.Server
	ln     net.Listener
	log    *os.File
	served chan error
}

// Start starts a recorder in l, whose policy file must come from [Admit].
func Start(ctx context.Context, l *lab.Lab) (_ *Recorder, err error) {
	r := &Recorder{Recorder: recordertest.New(), served: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("starting a recorder: %w (log: %s)", err, l.Log(name)), r.Stop())
		}
	}()
	key, err := l.Headscale.TagKey(ctx, tag)
	if err != nil {
		return nil, err
	}
	if r.log, err = os.Create(l.Log(name)); err != nil {
		return nil, err
	}
	logf := func(format string, args ...any) { fmt.Fprintf(r.log, format+"\n", args...) }
	r.node = &tsnet.Server{
		Hostname: name, Dir: filepath.Join(l.Dir, name), ControlURL: l.Headscale.URL(), AuthKey: key,
		Ephemeral: true, Logf: logf, UserLogf: logf,
	}
	if _, err := r.node.Up(ctx); err != nil {
		return nil, err
	}
	if r.ln, err = r.node.Listen("tcp", ":80"); err != nil {
		return nil, err
	}
	addr, _ := r.node.TailscaleIPs()
	r.Addr = netip.AddrPortFrom(addr, 80)
	go func() { r.served <- r.Serve(r.ln) }()
	return r, nil
}

// Stop removes the recorder from the tailnet.
func (r *Recorder) Stop() error {
	errs := []error{r.Close()}
	if r.ln != nil {
		errs = append(errs, <-r.served)
	}
	if r.node != nil {
		errs = append(errs, r.node.Close())
	}
	if r.log != nil {
		errs = append(errs, r.log.Close())
	}
	return errors.Join(errs...)
}

// Admit returns the policy file with rules that let a recorder join and the proxy
// reach it. It is a [lab.Config.Policy].
func Admit(policy []byte) ([]byte, error) {
	return change(policy, func(p map[string]any) {
		p["tagOwners"].(map[string]any)[tag] = []string{"group:prod"}
		p["grants"] = append(p["grants"].([]any), map[string]any{
			"src": []string{lab.ProxyTag}, "dst": []string{tag}, "ip": []string{"tcp:80"},
		})
	})
}

// Grant puts the user Login into Group and has the user's sessions recorded.
type Grant struct {
	Login, Group string
	Recorder     string // host:port
	Enforce      bool   // whether sessions have to be recorded
}

// AddTo returns the policy file with the grant added.
func (g Grant) AddTo(policy []byte) ([]byte, error) {
	return change(policy, func(p map[string]any) {
		p["grants"] = append(p["grants"].([]any), map[string]any{
			"src": []string{g.Login}, "dst": []string{lab.ProxyTag},
			"app": map[string]any{"tailscale.com/cap/kubernetes": []any{map[string]any{
				"impersonate":     map[string]any{"groups": []string{g.Group}},
				"recorderAddrs":   []string{g.Recorder}, // Headscale does not resolve recorder tags
				"enforceRecorder": g.Enforce,
			}}},
		})
	})
}

// change returns the policy file as changed by f.
func change(policy []byte, f func(map[string]any)) ([]byte, error) {
	standard, err := hujson.Standardize(policy)
	if err != nil {
		return nil, err
	}
	var p map[string]any
	if err := json.Unmarshal(standard, &p); err != nil {
		return nil, err
	}
	f(p)
	return json.Marshal(p)
}
