// SPDX-License-Identifier: Apache-2.0

package quota

import (
	"bufio"
	"net"
	"net/http"
	"sync"
	"time"
)

// client is the response writer of a request.
type client struct {
	http.ResponseWriter
	budget  *Budget
	account *account
	// waits is set for a session that waits for its answer.
	waits bool
	once  sync.Once
	// endsLater is set while the end of the answer is written after the request has been
	// handled, as over HTTP/1.1.
	endsLater bool
}

// answered records that the client no longer waits.
func (c *client) answered() {
	if c.waits {
		c.once.Do(func() { c.budget.await(c.account, -1) })
	}
}

// close must be called when the request has been handled.
func (c *client) close() {
	c.answered()
	if c.endsLater {
		c.account.writing.finish()
	}
}

// Unwrap is for [http.ResponseController].
func (c *client) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// Write implements [http.ResponseWriter].
func (c *client) Write(p []byte) (int, error) {
	c.account.writing.begin()
	defer c.account.writing.end()
	return c.ResponseWriter.Write(p)
}

// FlushError is for [http.ResponseController].
func (c *client) FlushError() error {
	c.account.writing.begin()
	defer c.account.writing.end()
	return http.NewResponseController(c.ResponseWriter).Flush()
}

// Hijack implements [http.Hijacker].
func (c *client) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c.answered()
	conn, buffered, err := http.NewResponseController(c.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	c.endsLater = false
	return &hijacked{conn, c.account.writing}, buffered, nil
}

// hijacked is the connection of an upgraded session.
type hijacked struct {
	net.Conn
	writing *writing
}

// Write implements [net.Conn].
func (h *hijacked) Write(p []byte) (int, error) {
	h.writing.begin()
	defer h.writing.end()
	return h.Conn.Write(p)
}

// writing counts a connection as [unread] while writes to it make no progress. A nil writing
// counts nothing.
type writing struct {
	budget  *Budget
	account *account
	stuck   *time.Timer // fires when no write has begun or ended for readWithin

	mu        sync.Mutex
	writes    int // in progress
	unread    bool
	finishing bool // one of writes is the end of an answer
}

func newWriting(b *Budget, a *account) *writing {
	w := &writing{budget: b, account: a}
	w.stuck = time.AfterFunc(readWithin, w.take) // which does nothing while nothing is being written
	return w
}

// begin records that a write begins.
func (w *writing) begin() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writes++
	w.stuck.Reset(readWithin)
}

// end records that a write has ended.
func (w *writing) end() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.progress()
}

// progress is end for a caller that holds w.mu.
func (w *writing) progress() {
	w.writes--
	w.stuck.Reset(readWithin)
	if w.unread {
		w.unread = false
		w.budget.give(w.account, unread)
	}
}

// finish records that the end of an answer is being written, until finished is called.
func (w *writing) finish() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.finishing { // handle_errors handles a request again
		w.finishing = true
		w.writes++
		w.stuck.Reset(readWithin)
	}
}

// finished records that the end of an answer, if one was being written, has been.
func (w *writing) finished() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.finishing {
		w.finishing = false
		w.progress()
	}
}

// take counts the connection as unread, or closes it.
func (w *writing) take() {
	w.mu.Lock()
	if w.writes == 0 || w.unread { // meanwhile
		w.mu.Unlock()
		return
	}
	w.unread = w.budget.take(w.account, unread)
	closes := !w.unread
	w.mu.Unlock()
	if closes {
		denied.With(ofConnection).Inc()
		w.account.conn.End(errTooMuch)
	}
}

// Interface guards
var (
	_ http.Hijacker = (*client)(nil)
	_ net.Conn      = (*hijacked)(nil)
)
