// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/hostile"
)

const (
	site = "https://" + lab.ProxyName + "." + lab.Domain
	// every is the time between two requests of a caller.
	every = 2 * time.Second
	// answerTimeout is how long a caller waits for an answer.
	answerTimeout = 30 * time.Second
)

// fill creates what the callers ask for.
func fill(ctx context.Context, l *lab.Lab) error {
	client, err := kubernetes.NewForConfig(l.Cluster.Admin())
	if err != nil {
		return err
	}
	_, err = client.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "small"}}, metav1.CreateOptions{})
	return err
}

// work is what the innocent callers do.
type work struct {
	mu        sync.Mutex
	measuring bool
	took      []time.Duration // of gets
	failed    int             // gets
	broken    []error         // watches and sessions
}

// newWork has each caller open a session and a watch, and get an object now and then, as
// long as ctx lasts.
func newWork(ctx context.Context, l *lab.Lab, callers []*lab.Caller) (*work, error) {
	w := new(work)
	for _, c := range callers {
		session, err := hostile.Upgraded(ctx, c, execInPod+"cat")
		if err != nil {
			return nil, fmt.Errorf("a session of %s: %w", c.Name, err)
		}
		watch, err := openWatch(ctx, c)
		if err != nil {
			return nil, fmt.Errorf("a watch of %s: %w", c.Name, err)
		}
		go w.keep(ctx, c.Name+"'s session", func() error { return echo(ctx, session) })
		go w.keep(ctx, c.Name+"'s watch", func() error {
			defer watch.Close()
			_, err := io.Copy(io.Discard, watch)
			return cmp.Or(err, io.ErrUnexpectedEOF)
		})
		go w.get(ctx, c)
	}
	return w, nil
}

// keep notes when f ends before ctx does.
func (w *work) keep(ctx context.Context, what string, f func() error) {
	err := f()
	if ctx.Err() != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.broken = append(w.broken, fmt.Errorf("%s: %w", what, err))
}

// lost returns which watches and sessions have ended.
func (w *work) lost() []error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.broken)
}

// echo has the pod of a session echo a line again and again.
func echo(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	line := []byte("hello\n")
	frame := append([]byte{0x82, 0x80 | 7, 0, 0, 0, 0, 0}, line...) // masked with zeros, on channel 0
	for {
		_ = conn.SetDeadline(time.Now().Add(answerTimeout))
		if _, err := conn.Write(frame); err != nil {
			return err
		}
		for heard := []byte(nil); !bytes.Equal(heard, line); {
			channel, data, err := readFrame(conn)
			if err != nil {
				return err
			}
			if channel == 1 {
				heard = append(heard, data...)
			}
		}
		if !sleep(ctx, every) {
			return ctx.Err()
		}
	}
}

// readFrame reads a message of a session: a channel and its data.
func readFrame(conn net.Conn) (channel byte, data []byte, err error) {
	header := make([]byte, 4)
	if _, err := io.ReadFull(conn, header[:2]); err != nil {
		return 0, nil, err
	}
	size := int(header[1] & 0x7f)
	if size == 126 {
		if _, err := io.ReadFull(conn, header[2:]); err != nil {
			return 0, nil, err
		}
		size = int(binary.BigEndian.Uint16(header[2:]))
	}
	data = make([]byte, size)
	if _, err := io.ReadFull(conn, data); err != nil {
		return 0, nil, err
	}
	if header[0]&0x0f == 8 {
		return 0, nil, fmt.Errorf("the session was closed: %q", data)
	}
	if size == 0 {
		return 0, nil, nil
	}
	return data[0], data[1:], nil
}

// client returns a client of a caller, with a connection of its own.
func client(c *lab.Caller) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:       c.Dial,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
		ForceAttemptHTTP2: true,
	}}
}

func openWatch(ctx context.Context, c *lab.Caller) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, site+"/api/v1/namespaces/default/configmaps?watch=true", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client(c).Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, errors.Join(errors.New(resp.Status), resp.Body.Close())
	}
	return resp.Body, nil
}

// get gets an object now and then, as kubectl does: with a new connection each time, and
// again after an answer that asks for it.
func (w *work) get(ctx context.Context, c *lab.Caller) {
	for sleep(ctx, every) {
		began := time.Now()
		err := getOnce(ctx, c)
		took := time.Since(began)
		if ctx.Err() != nil {
			return
		}
		w.mu.Lock()
		switch {
		case !w.measuring:
		case err != nil:
			w.failed++
		default:
			w.took = append(w.took, took)
		}
		w.mu.Unlock()
	}
}

func getOnce(ctx context.Context, c *lab.Caller) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	hc := client(c)
	defer hc.CloseIdleConnections()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, site+"/api/v1/namespaces/default/configmaps/small", nil)
		if err != nil {
			return err
		}
		resp, err := hc.Do(req)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		switch {
		case err != nil:
			return err
		case resp.Header.Get("Retry-After") != "":
			if !sleep(ctx, time.Second) {
				return ctx.Err()
			}
		case resp.StatusCode != http.StatusOK:
			return errors.New(resp.Status)
		default:
			return nil
		}
	}
}

// times are the times that gets took.
type times struct {
	p50, p99  time.Duration
	n, failed int
}

// measure returns the times of the gets in the time d.
func (w *work) measure(ctx context.Context, d time.Duration) times {
	w.mu.Lock()
	w.measuring, w.took, w.failed = true, nil, 0
	w.mu.Unlock()
	sleep(ctx, d)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.measuring = false
	slices.Sort(w.took)
	t := times{n: len(w.took), failed: w.failed}
	if t.n > 0 {
		t.p50, t.p99 = w.took[t.n/2], w.took[t.n*99/100]
	}
	return t
}
