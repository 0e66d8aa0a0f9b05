// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// leftOver runs a program on what all others leave of the processors. In the world, each
// attacker has a machine of its own. A low priority is not enough: its threads still end their
// time slice before one of another process goes on, at each step that a request takes. On a
// machine that does other work that may be too little: Tailscale's watchdog ends a process
// whose node stands still for 30 s.
var leftOver = []string{"chrt", "--idle", "0"}

// plan is what the attackers' process is told.
type plan struct {
	ControlURL     string
	Dir            string // for the state of tailnet nodes
	Duration, Pace time.Duration
	Attackers      []attacker
}

// attacker is a device that attacks.
type attacker struct{ Name, Key, Attack string }

// device is a tailnet node that attacks.
type device struct{ server *tsnet.Server }

func (d device) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return lab.Dial(ctx, d.server, network, address)
}

// attackAll runs in the attackers' process. It reads a plan from standard input, joins the
// tailnet, says so with a line, waits for a line, attacks, and prints the tallies.
func attackAll() error {
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil {
		return err
	}
	log.SetOutput(io.Discard)
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var p plan
	if err := in.Decode(&p); err != nil {
		return err
	}
	devices, err := p.join()
	if err != nil {
		return err
	}
	if err := out.Encode(len(devices)); err != nil {
		return err
	}
	var begin bool
	if err := in.Decode(&begin); err != nil {
		return err // the soak is over
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.Duration)
	defer cancel()
	var running sync.WaitGroup
	for i, d := range devices {
		running.Go(func() {
			first := p.Pace * time.Duration(i) / time.Duration(len(devices))
			attackNamed(p.Attackers[i].Attack).repeat(ctx, d, first, p.Pace)
		})
	}
	running.Wait()
	tallies := make(map[string]*tally)
	for _, a := range attacks {
		tallies[a.name] = a.tally
	}
	return out.Encode(tallies)
}

// join has the attackers join the tailnet, a few at a time.
func (p plan) join() ([]device, error) {
	devices := make([]device, len(p.Attackers))
	ctx, cancel := context.WithTimeout(context.Background(), joinTimeout)
	defer cancel()
	var joining errgroup.Group
	joining.SetLimit(8)
	for i, a := range p.Attackers {
		joining.Go(func() error {
			quiet := func(string, ...any) {}
			devices[i].server = &tsnet.Server{
				Hostname: a.Name, Dir: filepath.Join(p.Dir, a.Name), ControlURL: p.ControlURL, AuthKey: a.Key,
				Ephemeral: true, Logf: quiet, UserLogf: quiet,
			}
			_, err := devices[i].server.Up(ctx)
			return err
		})
	}
	return devices, joining.Wait()
}

// joinTimeout is how long all attackers may take to join the tailnet.
const joinTimeout = 10 * time.Minute

// attackers is the running process of the attackers.
type attackers struct {
	cmd *exec.Cmd
	in  *json.Encoder
	out *json.Decoder
}

// startAttackers starts a process in which devices join the tailnet of l. It ends with ctx.
func startAttackers(ctx context.Context, l *lab.Lab, o options, devices []attacker) (*attackers, error) {
	began := time.Now()
	p := plan{ControlURL: l.Headscale.URL(), Dir: filepath.Join(l.Dir, "attackers"), Duration: o.duration, Pace: o.pace, Attackers: devices}
	for i, d := range devices {
		user := login(d.Name)
		if err := l.Headscale.CreateUser(ctx, user); err != nil {
			return nil, err
		}
		var err error
		if p.Attackers[i].Key, err = l.Headscale.UserKey(ctx, user); err != nil {
			return nil, err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	a := &attackers{cmd: exec.CommandContext(ctx, leftOver[0], append(leftOver[1:], self, "attack")...)}
	stderr, err := os.Create(l.Log("attackers"))
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	a.cmd.Stderr = stderr
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err := a.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := a.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	a.in, a.out = json.NewEncoder(stdin), json.NewDecoder(stdout)
	if err := a.cmd.Start(); err != nil {
		return nil, err
	}
	var joined int
	if err := errors.Join(a.in.Encode(p), a.out.Decode(&joined)); err != nil {
		a.stop()
		return nil, fmt.Errorf("the attackers do not join the tailnet: %w (log: %s)", err, l.Log("attackers"))
	}
	fmt.Printf("  %5.1f s  %d devices that attack\n", time.Since(began).Seconds(), joined)
	return a, nil
}

// attack has all attack, and returns what became of it.
func (a *attackers) attack() (tallies map[string]*tally, err error) {
	err = errors.Join(a.in.Encode(true), a.out.Decode(&tallies))
	return tallies, err
}

// stop ends the process.
func (a *attackers) stop() {
	_ = a.cmd.Process.Kill()
	_ = a.cmd.Wait()
}
