// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"io"
	"net"
	"testing"
)

// connected returns a connection through a forwarder, and its other end.
func connected(t *testing.T) (f *forwarder, client, server *net.TCPConn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	f, err = forward("127.0.0.1", func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", listener.Addr().String())
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", f.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return f, c.(*net.TCPConn), s.(*net.TCPConn)
}

// A client that has sent everything still gets the answer.
func TestForwarder_PassesHalfCloses(t *testing.T) {
	f, client, server := connected(t)
	if _, err := client.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(server); string(got) != "question" || err != nil {
		t.Fatalf("the server reads %q, %v", got, err)
	}
	if _, err := server.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	server.Close()
	if got, err := io.ReadAll(client); string(got) != "answer" || err != nil {
		t.Fatalf("the client reads %q, %v", got, err)
	}
	if err := f.close(); err != nil {
		t.Error(err)
	}
}

func TestForwarder_CloseCutsOffWhatIsOpen(t *testing.T) {
	f, client, server := connected(t)
	if err := f.close(); err != nil {
		t.Error(err)
	}
	for _, conn := range []net.Conn{client, server} {
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("a connection is still open")
		}
	}
}
