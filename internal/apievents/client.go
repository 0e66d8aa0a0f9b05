// SPDX-License-Identifier: Apache-2.0

package apievents

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

const (
	// sendTimeout is how long all recorders together may take to accept an event.
	sendTimeout = 5 * time.Second
	// headStart is how long a recorder may take before the next is asked as well.
	// Both may have the event then.
	headStart = 500 * time.Millisecond
	// idleTimeout is how long an unused connection to a recorder is kept.
	idleTimeout = 30 * time.Second
)

// dialFunc connects to an address of the tailnet.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// client sends events to recorders. Tailscale's own dials anew for every event, and
// asks first whether the recorder takes any.
type client struct {
	transport *http.Transport

	mu sync.Mutex
	// slow are the recorders that last had their head start and took nothing, and
	// when each last took nothing for as long as an event may take, if it did.
	slow map[netip.AddrPort]time.Time
}

func newClient(dial dialFunc) *client {
	return &client{
		transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 16, IdleConnTimeout: idleTimeout, DisableCompression: true},
		slow:      make(map[netip.AddrPort]time.Time),
	}
}

// send returns once one of the recorders has taken the event, or an error if none
// has. One that does not answer costs a request its head start, and the next ones
// nothing.
func (c *client) send(ctx context.Context, recorders []netip.AddrPort, event []byte) error {
	if len(recorders) == 0 {
		return errors.New("the caller's grants name no address of a recorder; a control server that knows recorders' tags puts it there")
	}
	recorders, hopeless := c.sort(recorders)
	if hopeless {
		return errors.New("no recorder has answered in time, a moment ago")
	}
	attempts, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	results := make(chan error, len(recorders))
	ask := func(recorder netip.AddrPort) {
		err := c.post(attempts, recorder, event)
		switch {
		case err == nil:
			c.forgive(recorder)
		case errors.Is(attempts.Err(), context.DeadlineExceeded):
			c.blame(recorder, time.Now())
		}
		if err != nil {
			err = fmt.Errorf("recorder %v: %w", recorder, err)
		}
		results <- err
	}
	next := time.NewTimer(0)
	defer next.Stop()
	asked := 0
	var errs []error
	for len(errs) < len(recorders) {
		select {
		case <-next.C:
			if asked == len(recorders) {
				continue
			}
			if asked > len(errs) {
				c.blame(recorders[asked-1], time.Time{})
			}
			go ask(recorders[asked])
			asked++
			next.Reset(headStart)
		case err := <-results:
			if err == nil {
				return nil
			}
			errs = append(errs, err)
			next.Reset(0)
		}
	}
	return errors.Join(errs...)
}

// sort returns the recorders in the order in which to ask them: those that were slow
// come last. It is hopeless if none of them has taken anything, a moment ago.
func (c *client) sort(recorders []netip.AddrPort) (sorted []netip.AddrPort, hopeless bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	hopeless = true
	var slow []netip.AddrPort
	for _, recorder := range recorders {
		failed, ok := c.slow[recorder]
		if ok {
			slow = append(slow, recorder)
		} else {
			sorted = append(sorted, recorder)
		}
		hopeless = hopeless && ok && time.Since(failed) < sendTimeout
	}
	return append(sorted, slow...), hopeless
}

// blame notes that a recorder had its head start and took nothing. failed is when it
// took nothing for as long as an event may take, zero if it has not come to that.
func (c *client) blame(recorder netip.AddrPort, failed time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !failed.Before(c.slow[recorder]) {
		c.slow[recorder] = failed
	}
}

// forgive notes that a recorder has taken an event.
func (c *client) forgive(recorder netip.AddrPort) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.slow, recorder)
}

func (c *client) post(ctx context.Context, recorder netip.AddrPort, event []byte) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+recorder.String()+"/v2/event", bytes.NewReader(event))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	// Of a connection that the recorder closes just now, it cannot be known whether
	// the event was taken. Rather twice than not at all; the header is not sent.
	r.Header["Idempotency-Key"] = nil
	resp, err := c.transport.RoundTrip(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return errors.New("it takes no events, only sessions")
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("it answers %s: %s", resp.Status, said)
	}
	return err
}
