// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Supported returns why machines cannot run here, or nil.
func Supported() error {
	if os.Geteuid() != 0 {
		return errors.New("needs root")
	}
	if !holds(unix.CAP_SYS_ADMIN) || !holds(unix.CAP_NET_ADMIN) {
		return errors.New("needs the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN")
	}
	groups, err := ownGroups()
	if err != nil {
		return err
	}
	for _, needed := range []string{"cpu", "cpuset", "memory", "pids", "devices", "freezer"} {
		if _, ok := groups[needed]; !ok {
			return fmt.Errorf("needs control groups of version 1, with the controller %s", needed)
		}
	}
	return nil
}

// holds reports whether this process has a capability.
func holds(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}

// Machine is a running machine.
type Machine struct {
	Network Network

	guard    *exec.Cmd
	guardLog string
	lifeline *os.File      // the guard ends the machine when this is closed
	ended    chan struct{} // closed when the guard has ended
	guardErr error         // how; set before ended is closed

	control net.Conn // to the init

	mu        sync.Mutex
	closed    bool // no answer comes any more
	last      int
	processes map[int]*Process
	ids       map[*Process]int
}

// Start starts a machine and returns when programs can run on it.
func Start(ctx context.Context, cfg Config) (_ *Machine, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start machine %s: %w", cfg.Name, err)
		}
	}()
	if err := Supported(); err != nil {
		return nil, err
	}
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, err
	}
	slot, lock, err := takeSlot()
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	m := &Machine{
		Network:   network(slot),
		guardLog:  filepath.Join(cfg.Dir, "guard.log"),
		ended:     make(chan struct{}),
		processes: make(map[int]*Process),
		ids:       make(map[*Process]int),
	}
	if err := m.startGuard(setup{Config: cfg, Slot: slot, Network: m.Network}, lock); err != nil {
		return nil, err
	}
	answers := json.NewDecoder(m.control)
	ready := make(chan error, 1)
	go func() {
		var first answer
		err := answers.Decode(&first)
		if err == nil && first.Error != "" {
			err = errors.New(first.Error)
		}
		ready <- err
		if err == nil {
			m.readAnswers(answers)
		}
	}()
	select {
	case err = <-ready:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %s (log: %s)", err, lastLine(m.guardLog), m.guardLog), m.Stop())
	}
	return m, nil
}

// takeSlot takes a free slot. The slot is taken as long as a process has the socket.
func takeSlot() (int, *os.File, error) {
	for slot := range slots {
		// Abstract sockets leave no file, whatever ends their process.
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: "@caddy-tailscale-impersonate-" + slotName(slot)})
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if err != nil {
			return 0, nil, err
		}
		lock, err := ln.File()
		return slot, lock, errors.Join(err, ln.Close())
	}
	return 0, nil, fmt.Errorf("%d machines are running, which is the most", slots)
}

// startGuard starts the guard, which starts the init.
func (m *Machine) startGuard(s setup, lock *os.File) (err error) {
	log, err := os.Create(m.guardLog)
	if err != nil {
		return err
	}
	defer log.Close()
	alive, lifeline, err := os.Pipe()
	if err != nil {
		return err
	}
	defer alive.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return errors.Join(err, lifeline.Close())
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "control"), os.NewFile(uintptr(pair[1]), "control")
	defer ours.Close()
	defer theirs.Close()
	if m.control, err = net.FileConn(ours); err != nil {
		return errors.Join(err, lifeline.Close())
	}
	m.lifeline = lifeline
	m.guard = &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       []string{guardName, s.encode()},
		Env:        os.Environ(),
		Stdout:     log,
		Stderr:     log,
		ExtraFiles: []*os.File{alive, theirs, lock},
		// In a session of its own, it survives the signals of the terminal.
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := m.guard.Start(); err != nil {
		return errors.Join(err, lifeline.Close(), m.control.Close())
	}
	go func() {
		m.guardErr = m.guard.Wait()
		close(m.ended)
	}()
	return nil
}

// Stop ends everything that runs on the machine and returns when nothing of it is
// left. Another call waits too.
func (m *Machine) Stop() error {
	_ = m.lifeline.Close() // fails if it is closed already
	<-m.ended
	_ = m.control.Close() // as above
	if m.guardErr != nil {
		return fmt.Errorf("stop machine: %w: %s (log: %s)", m.guardErr, lastLine(m.guardLog), m.guardLog)
	}
	return nil
}

// Start starts a program on the machine. It ends with the machine.
func (m *Machine) Start(c Command) (*Process, error) {
	p := &Process{name: filepath.Base(c.Args[0]), log: c.Log, done: make(chan struct{})}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, fmt.Errorf("%s: %w", p.name, errEnded)
	}
	m.last++
	m.processes[m.last], m.ids[p] = p, m.last
	if err := json.NewEncoder(m.control).Encode(request{ID: m.last, Command: &c}); err != nil {
		delete(m.processes, m.last)
		delete(m.ids, p)
		return nil, fmt.Errorf("%s: %w", p.name, err)
	}
	return p, nil
}

// Run runs a program on the machine and waits until it has ended. If ctx ends first,
// Run kills it.
func (m *Machine) Run(ctx context.Context, c Command) error {
	p, err := m.Start(c)
	if err != nil {
		return err
	}
	select {
	case <-p.Done():
		return p.Err()
	case <-ctx.Done():
		m.Signal(p, unix.SIGKILL)
		<-p.Done()
		return fmt.Errorf("%s: %w (log: %s)", p.name, context.Cause(ctx), p.log)
	}
}

// Signal sends a signal to a program. It does nothing if the program has ended.
func (m *Machine) Signal(p *Process, signal syscall.Signal) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if id, ok := m.ids[p]; ok && !m.closed {
		// An error means that the machine ends, and with it the program.
		_ = json.NewEncoder(m.control).Encode(request{ID: id, Signal: signal})
	}
}

// readAnswers notes how programs end, until the machine ends.
func (m *Machine) readAnswers(answers *json.Decoder) {
	for {
		var a answer
		err := answers.Decode(&a)
		m.mu.Lock()
		if err != nil {
			m.closed = true
			for _, p := range m.processes {
				p.err = errEnded
				close(p.done)
			}
			m.mu.Unlock()
			return
		}
		p := m.processes[a.ID]
		delete(m.processes, a.ID)
		delete(m.ids, p)
		m.mu.Unlock()
		if a.Status != nil {
			p.status = *a.Status
		} else {
			p.err = errors.New(a.Error)
		}
		close(p.done)
	}
}
