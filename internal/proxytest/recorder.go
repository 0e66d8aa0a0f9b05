// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// The addresses of recorders on the tailnet.
const (
	RecorderAddr = "100.64.0.7:80"  // of StartRecorder
	AbsentAddr   = "100.64.0.8:80"  // refuses connections
	EmptyAddr    = "100.64.0.10:80" // does not answer
)

// Rules of a grant that ask for recordings.
const (
	SessionsWanted   = `{"recorderAddrs":["` + RecorderAddr + `"]}`
	SessionsEnforced = `{"recorderAddrs":["` + RecorderAddr + `"],"enforceRecorder":true}`
	EventsWanted     = `{"recorderAddrs":["` + RecorderAddr + `"],"enableEvents":true}`
	EventsEnforced   = `{"recorderAddrs":["` + RecorderAddr + `"],"enforceRecorder":true,"enableEvents":true}`
)

// StartRecorder starts a recorder. It returns the recorder, and a node that reaches it
// and knows alice as a member of tailnet-readers with further rules.
func StartRecorder(t testing.TB, rules ...string) (*recordertest.Recorder, *tailnet.Node) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := recordertest.New()
	served := make(chan error, 1)
	go func() { served <- r.Serve(ln) }()
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), <-served); err != nil {
			t.Errorf("the recorder: %v", err)
		}
	})
	who := WhoIs(append([]string{Readers}, rules...)...)
	who.Node.StableID, who.UserProfile.ID = "nLaptop", 7
	node := NewNode(who, nil)
	node.DialPeer = func(ctx context.Context, network, address string) (net.Conn, error) {
		switch address {
		case RecorderAddr:
			return (&net.Dialer{}).DialContext(ctx, network, ln.Addr().String())
		case EmptyAddr:
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return nil, errors.New("connection refused")
	}
	return r, node
}

// OneRecording returns the one recording that r has received, once it has ended.
func OneRecording(t testing.TB, r *recordertest.Recorder) *recordertest.Recording {
	t.Helper()
	all := r.Take()
	if len(all) != 1 {
		t.Fatalf("the recorder has %d recordings; want 1", len(all))
	}
	select {
	case <-all[0].Ended():
	case <-time.After(10 * time.Second):
		t.Fatal("the recording does not end")
	}
	return all[0]
}

// ParseCast returns the header of a recording and all that was shown.
func ParseCast(t testing.TB, b []byte) (header sessionrecording.CastHeader, output string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	if err := json.Unmarshal([]byte(lines[0]), &header); err != nil {
		t.Fatalf("header: %v: %q", err, lines[0])
	}
	for _, line := range lines[1:] {
		var event []any
		if err := json.Unmarshal([]byte(line), &event); err != nil || len(event) != 3 {
			t.Fatalf("event: %v: %q", err, line)
		}
		if event[1] == "o" {
			output += event[2].(string)
		}
	}
	return header, output
}
