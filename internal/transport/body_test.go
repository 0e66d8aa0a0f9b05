// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"errors"
	"io"
	"testing"
)

// blockingBody is a body of which nothing arrives until it is told to.
type blockingBody struct {
	reading chan struct{}
	arrive  chan string
	closed  chan struct{}
}

func (b *blockingBody) Read(p []byte) (int, error) {
	b.reading <- struct{}{}
	return copy(p, <-b.arrive), nil
}

func (b *blockingBody) Close() error { close(b.closed); return nil }

func TestRequestBody_IsClosedAfterRead(t *testing.T) {
	inner := &blockingBody{make(chan struct{}), make(chan string), make(chan struct{})}
	body := &requestBody{body: inner}
	read := make(chan string)
	go func() {
		p := make([]byte, 10)
		n, _ := body.Read(p)
		read <- string(p[:n])
	}()
	<-inner.reading
	for range 2 {
		if err := body.Close(); err != nil { // does not wait
			t.Fatal(err)
		}
	}
	select {
	case <-inner.closed:
		t.Error("the body was closed during a Read")
	default:
	}
	inner.arrive <- "arrived"
	if got := <-read; got != "arrived" {
		t.Errorf("read %q", got)
	}
	<-inner.closed
	// A part of a body must not be sent as a whole one.
	if n, err := body.Read(make([]byte, 10)); n > 0 || err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a closed body gave %d bytes and error %v; want an error", n, err)
	}
}

func TestRequestBody_IsClosedAtOnceIfNotRead(t *testing.T) {
	inner := &closeRecorder{}
	body := &requestBody{body: inner}
	if err := errors.Join(body.Close(), body.Close()); err != nil || !inner.closed {
		t.Errorf("got %v; closed: %t", err, inner.closed)
	}
}
