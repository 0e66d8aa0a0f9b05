// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/hostile"
)

// attack is one way to take from others what the proxy has.
type attack struct {
	name string
	// granted says that the attacker may open sessions. All others have no grant.
	granted bool
	// round attacks once, and holds what it took until ctx is done.
	round func(ctx context.Context, c hostile.Dialer) error
	tally *tally
}

// attacks lists all attacks. To add one, add a line.
var attacks = []attack{
	{name: "unread answers", round: unreadAnswers},
	{name: "unread small answers", round: unreadSmallAnswers},
	{name: "header fields", round: headerFields},
	{name: "headers without an end", round: endlessHeaders},
	{name: "idle connections", round: idleConnections},
	{name: "pipelined requests", round: pipelined},
	{name: "dropped execs", round: droppedExecs},
	{name: "long targets", round: longTargets},
	{name: "refused --as", round: refusedActAs},
	{name: "a thousand questions", round: thousandQuestions},
	{name: "unfinished frames", granted: true, round: unfinishedFrames},
	{name: "unread sessions", granted: true, round: unreadSessions},
}

func init() {
	for i := range attacks {
		attacks[i].tally = new(tally)
	}
}

func attackNamed(name string) attack {
	return attacks[slices.IndexFunc(attacks, func(a attack) bool { return a.name == name })]
}

// tally counts the rounds of an attack.
type tally struct {
	mu     sync.Mutex
	Rounds int
	Last   string // the last error
}

// repeat attacks from c once every pace, first after the time given.
func (a attack) repeat(ctx context.Context, c hostile.Dialer, first, pace time.Duration) {
	if !sleep(ctx, first) {
		return
	}
	for {
		round, cancel := context.WithTimeout(ctx, pace)
		err := a.round(round, c)
		a.tally.mu.Lock()
		a.tally.Rounds++
		if err != nil && ctx.Err() == nil { // it was told to go away
			a.tally.Last = err.Error()
		}
		a.tally.mu.Unlock()
		<-round.Done()
		cancel()
		if ctx.Err() != nil {
			return
		}
	}
}

// sleep reports whether d has passed before ctx is done.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// hold closes conns when ctx is done.
func hold(ctx context.Context, conns ...net.Conn) {
	<-ctx.Done()
	for _, c := range conns {
		_ = c.Close()
	}
}

func unreadAnswers(ctx context.Context, c hostile.Dialer) error {
	conn, err := hostile.UnreadAnswers(ctx, c, "/openapi/v2", 240)
	if conn != nil {
		hold(ctx, conn)
	}
	return err
}

// unreadSmallAnswers asks for what fits into the buffers of the server.
func unreadSmallAnswers(ctx context.Context, c hostile.Dialer) error {
	var conns []net.Conn
	var errs []error
	for range 5 {
		conn, err := hostile.UnreadAnswers(ctx, c, "/version", 240)
		if conn != nil {
			conns = append(conns, conn)
		}
		errs = append(errs, err)
	}
	hold(ctx, conns...)
	return errors.Join(errs...)
}

func headerFields(ctx context.Context, c hostile.Dialer) error {
	conn, err := hostile.HeaderBombs(ctx, c, "/api", 200)
	if conn != nil {
		hold(ctx, conn)
	}
	return err
}

// endlessHeaders sends most of the headers of a request, and then nothing.
func endlessHeaders(ctx context.Context, c hostile.Dialer) error {
	var head strings.Builder
	// After a whole request, so that the connection is not a new one.
	head.WriteString("GET /api HTTP/1.1\r\nHost: k8s\r\n\r\nGET /api HTTP/1.1\r\nHost: k8s\r\n")
	for i := 0; head.Len() < 30<<10; i++ {
		fmt.Fprintf(&head, "%x:\n", i)
	}
	return many(ctx, c, 20, head.String())
}

func idleConnections(ctx context.Context, c hostile.Dialer) error { return many(ctx, c, 50, "") }

// pipelined asks for large answers again and again over HTTP/1.1, and reads nothing.
func pipelined(ctx context.Context, c hostile.Dialer) error {
	return many(ctx, c, 20, strings.Repeat("GET /openapi/v2 HTTP/1.1\r\nHost: k8s\r\n\r\n", 100))
}

// many opens n connections, sends raw on each, and reads nothing.
func many(ctx context.Context, c hostile.Dialer, n int, raw string) error {
	var conns []net.Conn
	var errs []error
	for range n {
		conn, err := hostile.TLS(ctx, c, "http/1.1")
		if err != nil {
			errs = append(errs, err)
			break
		}
		conns = append(conns, conn)
		_ = conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.WriteString(conn, raw); err != nil {
			errs = append(errs, err)
		}
	}
	hold(ctx, conns...)
	return errors.Join(errs...)
}

const execInPod = "/api/v1/namespaces/default/pods/" + lab.Pod + "/exec?stdin=true&stdout=true&command="

// droppedExecs asks for sessions with a long command that is longer still in JSON, and
// hangs up at once.
func droppedExecs(ctx context.Context, c hostile.Dialer) error {
	for i := range 20 {
		conn, err := hostile.Upgrade(ctx, c, execInPod+strings.Repeat("<", 30<<10))
		if err != nil {
			return err
		}
		sleep(ctx, time.Duration(i%6)*time.Millisecond)
		if err := conn.Close(); err != nil {
			return err
		}
	}
	return nil
}

// longTargets sends what is longer in logs and answers than it is on the wire.
func longTargets(ctx context.Context, c hostile.Dialer) error {
	long := strings.Repeat("\xff", 30<<10)
	for _, head := range []string{"GET a:" + long + " HTTP/1.1\r\nHost: k8s\r\n", "GET /api HTTP/1.1\r\nHost: " + strings.Repeat("x", 30<<10) + "\r\n", "GET /api HTTP/1.1\r\nHost: k8s\r\nOrigin: " + long + "\r\nUser-Agent: Mozilla/5.0\r\n"} {
		if err := request(ctx, c, head+"\r\n"); err != nil {
			return err
		}
	}
	return nil
}

func refusedActAs(ctx context.Context, c hostile.Dialer) error {
	for range 10 {
		if err := request(ctx, c, "GET /api/v1/pods HTTP/1.1\r\nHost: k8s\r\nImpersonate-User: "+strings.Repeat("x", 30<<10)+"\r\n\r\n"); err != nil {
			return err
		}
	}
	return nil
}

// request sends a raw request on a connection of its own, and reads the answer.
func request(ctx context.Context, c hostile.Dialer, raw string) error {
	conn, err := hostile.TLS(ctx, c, "http/1.1")
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, raw); err != nil {
		return err
	}
	_, err = io.CopyN(io.Discard, conn, 100)
	return err
}

// thousandQuestions asks who it is, and for what it may not have, a thousand times at once.
func thousandQuestions(ctx context.Context, c hostile.Dialer) error {
	var conns []net.Conn
	var errs []error
	for i := range 4 {
		conn, err := hostile.NewHTTP2(ctx, c, 1<<20)
		if err != nil {
			errs = append(errs, err)
			break
		}
		conns = append(conns, conn)
		for range 250 {
			if err := conn.Get([]string{"/whoami", "/api/v1/secrets"}[i%2]); err != nil {
				errs = append(errs, err)
				break
			}
		}
	}
	hold(ctx, conns...)
	return errors.Join(errs...)
}

// sessions opens n sessions, and calls f with each.
func sessions(ctx context.Context, c hostile.Dialer, n int, target string, f func(net.Conn) error) error {
	var conns []net.Conn
	var errs []error
	for range n {
		conn, err := hostile.Upgraded(ctx, c, target)
		if err != nil {
			errs = append(errs, err)
			break
		}
		conns = append(conns, conn)
		errs = append(errs, f(conn))
	}
	hold(ctx, conns...)
	return errors.Join(errs...)
}

func unfinishedFrames(ctx context.Context, c hostile.Dialer) error {
	return sessions(ctx, c, 5, execInPod+"cat", func(conn net.Conn) error { return hostile.Frame(conn, 1<<20) })
}

// unreadSessions opens sessions that print without an end, and reads nothing.
func unreadSessions(ctx context.Context, c hostile.Dialer) error {
	return sessions(ctx, c, 5, execInPod+"yes", func(net.Conn) error { return nil })
}
