// SPDX-License-Identifier: Apache-2.0

// Package recorder puts a session recorder onto the tailnet. It is not Tailscale's,
// which is not published as source, but speaks as that is spoken to by Tailscale's
// own client.
package recorder

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recording/recordertest"
)

// Recorder is a session recorder on a tailnet.
type Recorder struct {
	*recordertest.Recorder
	// Addr is where it is found.
	Addr netip.AddrPort

	node   *tsnet.Server
	ln     net.Listener
	log    *os.File
	served chan error
}

// Config says how a recorder joins its tailnet.
type Config struct {
	Hostname, ControlURL, AuthKey string
	// Dir is where its node keeps its state, LogFile where it writes its log.
	Dir, LogFile string
}

// Start brings up a recorder.
func Start(ctx context.Context, cfg Config) (_ *Recorder, err error) {
	r := &Recorder{Recorder: recordertest.New(), served: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("starting recorder %s: %w", cfg.Hostname, err), r.Stop())
		}
	}()
	if r.log, err = os.Create(cfg.LogFile); err != nil {
		return nil, err
	}
	logf := func(format string, args ...any) { fmt.Fprintf(r.log, format+"\n", args...) }
	r.node = &tsnet.Server{
		Hostname: cfg.Hostname, Dir: cfg.Dir, ControlURL: cfg.ControlURL, AuthKey: cfg.AuthKey,
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

// Stop takes the recorder off the tailnet.
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
