// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"errors"
	"io"
	"sync"
)

// The API server may answer before it has read a request's body, and does so when it
// refuses one. Many clients then send none of the body until the answer has ended. So
// nothing here may wait for the body: the answer would never end.

// closedLater is the body of a response to a request with a body. Its Close does not wait
// until the request's body can be read no further, as net/http's does. The end of the
// request ends what goes on here.
type closedLater struct{ io.ReadCloser }

func (b closedLater) Close() error {
	go func() { _ = b.ReadCloser.Close() }()
	return nil
}

// requestBody is a request's body, which net/http may close while it reads it.
// reverse_proxy's body does not allow that, and is closed when it has been read.
type requestBody struct {
	mu              sync.Mutex
	body            io.ReadCloser
	reading, closed bool
}

var errBodyClosed = errors.New("the request's body is closed")

func (b *requestBody) Read(p []byte) (int, error) {
	if !b.begin() {
		return 0, errBodyClosed
	}
	n, err := b.body.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reading = false
	if b.closed {
		_ = b.body.Close()
	}
	return n, err
}

// begin reports whether the body may be read.
func (b *requestBody) begin() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reading = !b.closed
	return b.reading
}

func (b *requestBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	if b.reading {
		return nil
	}
	return b.body.Close()
}
