// SPDX-License-Identifier: Apache-2.0

package recordertest

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
)

// Start starts a recorder that is reached by Dial, without a network, until the test
// ends. It works in a bubble of testing/synctest.
func Start(t testing.TB) *Recorder {
	t.Helper()
	r := New()
	r.memory = &memoryListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	served := make(chan error, 1)
	go func() { served <- r.Serve(r.memory) }()
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), <-served); err != nil {
			t.Error(err)
		}
	})
	return r
}

// Dial connects to a recorder that Start returned.
func (r *Recorder) Dial(ctx context.Context) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case r.memory.conns <- server:
		return client, nil
	case <-r.memory.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// memoryListener accepts the connections of Dial.
type memoryListener struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

// Accept implements [net.Listener].
func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (l *memoryListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements [net.Listener].
func (*memoryListener) Addr() net.Addr { return &net.UnixAddr{Name: "recorder", Net: "memory"} }
