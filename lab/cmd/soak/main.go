// SPDX-License-Identifier: Apache-2.0

// Command soak attacks the proxy from many devices at once, in each way that [attacks]
// lists, beside devices that work with the cluster and must not notice. It prints what the
// proxy used and what the others saw, each with its target, and exits with status 1 if a
// target is missed.
//
// The proxy is Caddy's own command with the stand-in for caddy-tailscale, and has the memory
// limit of the shipped manifest.
// The attackers run in another, at a low priority: in the world, they have machines of
// their own. Everything else is the lab: nothing leaves the machine.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// options are the command's flags.
type options struct {
	duration, baseline, pace time.Duration
	attackers, innocents     int
	only, dir, caddy         string
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == "attack" {
		if err := attackAll(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.DurationVar(&o.duration, "duration", 10*time.Minute, "how long the attacks last")
	flag.DurationVar(&o.baseline, "baseline", time.Minute, "how long the innocent callers are measured without attacks before that")
	flag.DurationVar(&o.pace, "pace", 30*time.Second, "how often each attacker attacks")
	flag.IntVar(&o.attackers, "attackers", 100, "how many devices attack")
	flag.IntVar(&o.innocents, "innocents", 20, "how many devices work with the cluster")
	flag.StringVar(&o.only, "only", "", "run only the attacks with these names (comma-separated)")
	flag.StringVar(&o.caddy, "caddy", "", "the Caddy to attack (default: .bin/caddy-standin in the lab's folder)")
	flag.StringVar(&o.dir, "dir", "", "folder for logs (default: .run/soak in the lab's folder)")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A last resort, for a lab that does not start.
	ctx, cancel := context.WithTimeout(ctx, o.baseline+o.duration+15*time.Minute)
	met, err := run(ctx, o)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
	}
	if err != nil || !met {
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (met bool, err error) {
	var chosen []attack
	for _, a := range attacks {
		if o.only == "" || strings.Contains(","+o.only+",", ","+a.name+",") {
			chosen = append(chosen, a)
		}
	}
	if len(chosen) == 0 {
		return false, fmt.Errorf("no attack is named %q", o.only)
	}
	root, err := lab.Root()
	if err != nil {
		return false, err
	}
	if o.dir == "" {
		o.dir = filepath.Join(root, "lab", ".run", "soak")
	}
	if o.caddy == "" {
		o.caddy = filepath.Join(root, "lab", ".bin", "caddy-standin")
	}
	if err := os.RemoveAll(o.dir); err != nil {
		return false, err
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return false, err
	}
	fmt.Printf("Starting a tailnet and a cluster (logs: %s)\n", o.dir)
	innocentDevices, attackingDevices, admins := devices(o, chosen)
	l, err := lab.Start(ctx, lab.Config{
		Dir:      o.dir,
		Examples: filepath.Join(root, "examples"),
		Policy:   func(policy []byte) ([]byte, error) { return admit(policy, admins) },
		Progress: os.Stdout,
	})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, l.Stop()) }()
	if err := fill(ctx, l); err != nil {
		return false, err
	}
	p, err := startProxy(ctx, l, o.caddy)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()

	innocents, err := join(ctx, l, innocentDevices)
	if err != nil {
		return false, err
	}
	if err := p.wait(ctx, l, innocents[0]); err != nil {
		return false, err
	}
	attackers, err := startAttackers(ctx, l, o, attackingDevices)
	if err != nil {
		return false, err
	}
	defer attackers.stop()
	work, err := newWork(ctx, l, innocents)
	if err != nil {
		return false, err
	}
	fmt.Printf("Measuring %d callers for %v\n", len(innocents), o.baseline)
	without := work.measure(ctx, o.baseline)
	before, err := p.usage()
	if err != nil {
		return false, err
	}

	fmt.Printf("Attacking from %d devices for %v\n", len(attackingDevices), o.duration)
	attacking, cancel := context.WithTimeout(ctx, o.duration)
	defer cancel()
	watched := make(chan usage, 1)
	go func() { watched <- p.peak(attacking, before) }()
	measured := make(chan times, 1)
	go func() { measured <- work.measure(attacking, o.duration) }()
	tallies, err := attackers.attack()
	if err != nil {
		return false, fmt.Errorf("the attackers did not survive: %w (log: %s)", err, l.Log("attackers"))
	}
	with, peak := <-measured, <-watched
	if err := ctx.Err(); err != nil {
		return false, err
	}
	after, err := p.usage()
	if err != nil {
		return false, fmt.Errorf("the proxy did not survive: %w", err)
	}
	peak = peak.max(after)
	for _, a := range chosen {
		fmt.Printf("  %-28s %d rounds, last error: %s\n", a.name, tallies[a.name].Rounds, cmp.Or(tallies[a.name].Last, "none"))
	}
	return report(before, peak, without, with, work.lost()), nil
}

// devices returns the devices that work with the cluster and those that attack. Each is
// another user's. The former are in the group that may do anything, as are the attackers
// whose attack needs a grant; other attackers have none.
func devices(o options, chosen []attack) (innocents []lab.CallerSpec, attackers []attacker, admins []string) {
	for i := range o.innocents {
		d := lab.CallerSpec{Name: fmt.Sprint("innocent-", i)}
		d.Login = login(d.Name)
		innocents, admins = append(innocents, d), append(admins, d.Login)
	}
	for i := range o.attackers {
		a := chosen[i%len(chosen)]
		d := attacker{Name: fmt.Sprint("attacker-", i), Attack: a.name}
		attackers = append(attackers, d)
		if a.granted {
			admins = append(admins, login(d.Name))
		}
	}
	return innocents, attackers, admins
}

func login(device string) string { return device + "@example.com" }

// admit adds users to the group of the policy file that may do anything.
func admit(policy []byte, users []string) ([]byte, error) {
	const alone = `["alice@example.com"]`
	if bytes.Count(policy, []byte(alone)) != 1 {
		return nil, fmt.Errorf("the policy file has no group with only %s", alone)
	}
	list, err := json.Marshal(users)
	return bytes.Replace(policy, []byte(alone), list, 1), err
}

// join has devices join the tailnet, a few at a time.
func join(ctx context.Context, l *lab.Lab, specs []lab.CallerSpec) ([]*lab.Caller, error) {
	callers := make([]*lab.Caller, len(specs))
	var joining errgroup.Group
	joining.SetLimit(8)
	began := time.Now()
	for i, spec := range specs {
		joining.Go(func() (err error) {
			callers[i], err = l.Join(ctx, spec)
			return err
		})
	}
	err := joining.Wait()
	fmt.Printf("  %5.1f s  %d devices\n", time.Since(began).Seconds(), len(specs))
	return callers, err
}
