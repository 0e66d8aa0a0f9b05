// SPDX-License-Identifier: Apache-2.0

package recorder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// headStart is how long a recorder may take before the next one is asked as well.
// Both may store the event then.
const headStart = 500 * time.Millisecond

// Send sends an event to one of the recorders, dialling as node. It returns an error
// if none of them accepts the event. Tailscale's own client dials anew for every event,
// and asks first whether the recorder takes any.
func (c *Client) Send(ctx context.Context, node *tailnet.Node, recorders []netip.AddrPort, event []byte) error {
	if len(recorders) == 0 {
		return errNoAddress
	}
	return c.as(node).send(ctx, recorders, event)
}

// send asks the recorders one after the other, each with a head start.
func (n *nodeClient) send(ctx context.Context, recorders []netip.AddrPort, event []byte) error {
	recorders = n.memory.order(recorders)
	if len(recorders) == 0 {
		return errHanging
	}
	attempts, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	results := make(chan error, len(recorders))
	ask := func(recorder netip.AddrPort) {
		err := n.post(attempts, recorder, event)
		switch {
		case err == nil:
			n.memory.noteAnswer(recorder)
		case errors.Is(attempts.Err(), context.DeadlineExceeded):
			n.memory.noteTimeout(recorder)
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
				n.memory.noteLate(recorders[asked-1])
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

// post sends an event to one recorder.
func (n *nodeClient) post(ctx context.Context, recorder netip.AddrPort, event []byte) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+recorder.String()+"/v2/event", bytes.NewReader(event))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	// net/http then retries when the recorder closes a kept connection, although the
	// event may have arrived: better twice than not at all. The header is not sent.
	r.Header["Idempotency-Key"] = nil
	resp, err := n.events.RoundTrip(r)
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
