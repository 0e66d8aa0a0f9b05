// SPDX-License-Identifier: Apache-2.0

//go:build linux

package machine

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// start starts a machine that ends with the test.
func start(t *testing.T, cfg Config) *Machine {
	t.Helper()
	if err := Supported(); err != nil {
		t.Skip("no machine: ", err)
	}
	cfg.Name, cfg.Dir = "test", t.TempDir()
	m, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Stop() }) // tests look at the first result
	return m
}

// shell runs a shell script on a machine and returns its output.
func shell(t *testing.T, m *Machine, script string) (string, error) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	err := m.Run(t.Context(), Command{Args: []string{"/bin/sh", "-c", script}, Env: os.Environ(), Log: log})
	out, readErr := os.ReadFile(log)
	if readErr != nil {
		t.Fatal(readErr)
	}
	return string(out), err
}

// groupsOf returns the control groups of a slot.
func groupsOf(t *testing.T, m *Machine) (found []string) {
	t.Helper()
	groups, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		dir := filepath.Join(g.dir, slotName(int(m.Network.Host.As4()[2])))
		if _, err := os.Stat(dir); err == nil {
			found = append(found, dir)
		}
	}
	return found
}

func TestMachine_HasNamespacesAndFilesOfItsOwn(t *testing.T) {
	const file = "/proc/sys/kernel/panic"
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := start(t, Config{Files: map[string]string{file: "4711\n"}})
	out, err := shell(t, m, "hostname; cat "+file+"; ls /run; cat /proc/self/cgroup; echo $(cat /proc/1/comm); touch /var/lib/x /var/log/x; mkdir /sys/fs/cgroup/memory/below")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out, "test\n4711\n") || strings.Contains(out, "labmachine") {
		t.Errorf("on the machine: %s; want its name, its file and no sign of its control groups", out)
	}
	if after, err := os.ReadFile(file); err != nil || string(after) != string(before) {
		t.Errorf("%s is %q here, %v; want %q as before", file, after, err, before)
	}
	for _, path := range []string{"/var/lib/x", "/var/log/x"} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s of the machine is here", path)
		}
	}
	if groups := groupsOf(t, m); len(groups) < 6 {
		t.Errorf("its control groups are %q", groups)
	}
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	if groups := groupsOf(t, m); len(groups) > 0 {
		t.Errorf("left: %q", groups)
	}
}

func TestMachine_ConnectsBothWays(t *testing.T) {
	m := start(t, Config{})
	ln, err := net.Listen("tcp", net.JoinHostPort(m.Network.Host.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accepted := make(chan string, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			accepted <- err.Error()
			return
		}
		defer conn.Close()
		accepted <- conn.RemoteAddr().String()
	}()
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if out, err := shell(t, m, "exec bash -c '</dev/tcp/"+m.Network.Host.String()+"/"+port+"'"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if from, want := <-accepted, m.Network.Machine.Addr().String()+":"; !strings.HasPrefix(from, want) {
		t.Errorf("the machine connected from %s; want %s", from, want)
	}
	// Nothing listens there, which the machine says itself.
	if _, err := net.DialTimeout("tcp", closedPort(m), 10*time.Second); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dialling the machine: %v; want %v", err, unix.ECONNREFUSED)
	}
}

// closedPort returns an address of the machine on which nothing listens.
func closedPort(m *Machine) string { return net.JoinHostPort(m.Network.Machine.Addr().String(), "1") }

func TestMachine_SaysHowProgramsEnd(t *testing.T) {
	m := start(t, Config{})
	if _, err := shell(t, m, "true"); err != nil {
		t.Error(err)
	}
	if _, err := shell(t, m, "echo the reason; exit 3"); err == nil || !strings.Contains(err.Error(), "exit code 3: the reason") {
		t.Errorf("got error %v; want the exit code and the last line", err)
	}
	if err := m.Run(t.Context(), Command{Args: []string{"/does/not/exist"}, Log: filepath.Join(t.TempDir(), "log")}); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("got error %v; want: no such file", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := m.Run(ctx, Command{Args: []string{"/bin/sleep", "1000"}, Log: filepath.Join(t.TempDir(), "log")}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got error %v; want %v", err, context.DeadlineExceeded)
	}
	if out, err := shell(t, m, "! grep -l sleep /proc/[0-9]*/comm"); err != nil {
		t.Errorf("left: %s", out)
	}
}

func TestMachine_ReapsOrphans(t *testing.T) {
	m := start(t, Config{})
	if out, err := shell(t, m, `(sleep 0.01 & sleep 0.01 &)
i=0; while grep -l '^State:.Z' /proc/[0-9]*/status || pgrep -x sleep; do i=$((i+1)); [ $i -lt 500 ] || exit 1; sleep 0.02 & wait; done`); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestMachine_EndsItsPrograms(t *testing.T) {
	m := start(t, Config{})
	p, err := m.Start(Command{Args: []string{"/bin/sleep", "1000"}, Log: filepath.Join(t.TempDir(), "log")})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	if err := p.Err(); !errors.Is(err, errEnded) {
		t.Errorf("the program ended with %v; want %v", err, errEnded)
	}
	if _, err := m.Start(Command{Args: []string{"/bin/true"}}); !errors.Is(err, errEnded) && !errors.Is(err, net.ErrClosed) {
		t.Errorf("starting another: %v; want %v", err, errEnded)
	}
}

func TestMachine_SeveralHaveAddressesOfTheirOwn(t *testing.T) {
	a, b := start(t, Config{}), start(t, Config{})
	if a.Network == b.Network {
		t.Errorf("two machines have the addresses %v", a.Network)
	}
	if out, err := shell(t, b, "true"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// What a killed guard leaves, the next machine removes.
func TestMachine_SurvivesKilledGuard(t *testing.T) {
	m := start(t, Config{})
	p, err := m.Start(Command{Args: []string{"/bin/sleep", "1000"}, Log: filepath.Join(t.TempDir(), "log")})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.guard.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := p.Err(); !errors.Is(err, errEnded) {
		t.Errorf("the program ended with %v; want %v", err, errEnded)
	}
	if err := m.Stop(); err == nil {
		t.Error("the machine stopped well, without its guard")
	}
	// Others may take the slot first.
	deadline := time.Now().Add(30 * time.Second)
	for len(groupsOf(t, m)) > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("left: %q", groupsOf(t, m))
		}
		if err := start(t, Config{}).Stop(); err != nil {
			t.Fatal(err)
		}
	}
}
