// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"k8s.io/client-go/rest"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// target is a server to which requests are sent.
type target struct {
	kind   string
	proxy  *proxy // nil if there is none
	base   string
	client *http.Client
}

// through returns the target behind a proxy, with a client that keeps its
// connections.
func through(p *proxy, from *tsnet.Server) target {
	return target{kind: p.kind, proxy: p, base: "http://" + p.Address, client: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return lab.Dial(ctx, from, network, address)
		},
		MaxIdleConnsPerHost: 1000,
		DisableCompression:  true,
	}}}
}

// without returns the API server itself as a target.
func without(config *rest.Config) (target, error) {
	config.QPS = -1
	config.DisableCompression = true
	client, err := rest.HTTPClientFor(config)
	return target{kind: direct, base: config.Host, client: client}, err
}

// sample is one round's measurement of a proxy.
type sample struct {
	requests int
	cpu      time.Duration // of the proxy's process
	p50, p99 time.Duration
}

// perRequest returns the CPU time of a request in microseconds.
func (s sample) perRequest() float64 {
	return float64(s.cpu.Nanoseconds()) / 1e3 / float64(s.requests)
}

// load requests path with several concurrent callers for a while. Each sends its
// next request when the previous one is answered.
func (t target) load(ctx context.Context, path string, callers int, d time.Duration) (s sample, err error) {
	until := time.Now().Add(d)
	return t.measure(func(took *latencies) error {
		var asking sync.WaitGroup
		var failed error
		var mu sync.Mutex
		for range callers {
			asking.Go(func() {
				var mine []time.Duration
				var err error
				for err == nil && time.Now().Before(until) {
					began := time.Now()
					err = t.get(ctx, path)
					mine = append(mine, time.Since(began))
				}
				mu.Lock()
				defer mu.Unlock()
				*took = append(*took, mine...)
				if err != nil {
					failed = err
				}
			})
		}
		asking.Wait()
		return failed
	})
}

type latencies []time.Duration

// measure measures what f does.
func (t target) measure(f func(*latencies) error) (s sample, err error) {
	var before, after time.Duration
	if t.proxy != nil {
		if before, err = t.proxy.cpu(); err != nil {
			return sample{}, err
		}
	}
	var took latencies
	if err := f(&took); err != nil {
		return sample{}, fmt.Errorf("%s: %w", t.kind, err)
	}
	if t.proxy != nil {
		if after, err = t.proxy.cpu(); err != nil {
			return sample{}, err
		}
	}
	slices.Sort(took)
	return sample{
		requests: len(took), cpu: after - before,
		p50: took[len(took)/2], p99: took[len(took)*99/100],
	}, nil
}

// get requests path once and reads the answer.
func (t target) get(ctx context.Context, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.base+path, nil)
	if err != nil {
		return err
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return nil
}

// inRounds measures all targets in each round, after a short warm-up. Each round
// begins with another target.
func (b *bench) inRounds(targets []target, measure func(t target, warmUp bool) (sample, error)) (map[string][]sample, error) {
	for _, t := range targets {
		if _, err := measure(t, true); err != nil {
			return nil, err
		}
	}
	samples := make(map[string][]sample)
	for round := range b.rounds {
		for i := range targets {
			t := targets[(round+i)%len(targets)]
			s, err := measure(t, false)
			if err != nil {
				return nil, err
			}
			samples[t.kind] = append(samples[t.kind], s)
		}
	}
	return samples, nil
}
