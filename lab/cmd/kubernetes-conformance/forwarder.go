// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// patience is how long a client waits for its connection.
const patience = 20 * time.Second

// forwarder passes connections on, for programs that are not on the tailnet and know no SOCKS
// proxy. Whoever can connect to it is the caller as whom it connects.
type forwarder struct {
	listener net.Listener
	cancel   context.CancelFunc
	open     sync.WaitGroup
}

// forward starts a forwarder that listens on an address of this machine, and passes connections
// on to what dial connects to.
func forward(address string, dial func(context.Context) (net.Conn, error)) (*forwarder, error) {
	listener, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	f := &forwarder{listener: listener, cancel: cancel}
	f.open.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // it was closed
			}
			f.open.Go(func() { pass(ctx, conn, dial) })
		}
	})
	return f, nil
}

// url returns the URL that leads through the forwarder.
func (f *forwarder) url() string { return "https://" + f.listener.Addr().String() }

// close stops the forwarder and cuts off what passes through it.
func (f *forwarder) close() error {
	err := f.listener.Close()
	f.cancel()
	f.open.Wait()
	return err
}

// pass passes one connection on, and returns when both directions have ended.
func pass(ctx context.Context, conn net.Conn, dial func(context.Context) (net.Conn, error)) {
	defer conn.Close()
	dialing, cancel := context.WithTimeout(ctx, patience)
	out, err := dial(dialing)
	cancel()
	if err != nil {
		return
	}
	defer out.Close()
	cut := func() { _ = errors.Join(conn.Close(), out.Close()) }
	defer context.AfterFunc(ctx, cut)()
	var directions sync.WaitGroup
	for _, d := range []struct{ to, from net.Conn }{{out, conn}, {conn, out}} {
		directions.Go(func() {
			_, err := io.Copy(d.to, d.from)
			if half, ok := d.to.(interface{ CloseWrite() error }); ok && err == nil {
				err = half.CloseWrite()
			}
			if err != nil { // one side is gone, which the other has to notice
				cut()
			}
		})
	}
	directions.Wait()
}
