// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Folders in a machine's folder.
const (
	stateDir = "state" // what is removed with the machine
	logsDir  = "log"   // /var/log
)

// initProcess is the first process of the machine. It never returns nil: the guard
// kills it.
func initProcess(s setup) error {
	hold, control := os.NewFile(3, "hold"), os.NewFile(4, "control")
	syscall.CloseOnExec(3)
	syscall.CloseOnExec(4)
	// Until the guard has connected the network and moved this process into its
	// control groups.
	if n, _ := hold.Read(make([]byte, 1)); n != 1 {
		return errors.New("the guard has ended")
	}
	_ = hold.Close()

	answers := json.NewEncoder(control)
	err := arrange(s)
	if err != nil {
		err = errors.Join(err, answers.Encode(answer{Error: err.Error()}))
		return err
	}
	if err := answers.Encode(answer{}); err != nil {
		return err
	}
	return serve(json.NewDecoder(control), answers)
}

// arrange makes the namespaces look like a machine.
func arrange(s setup) error {
	// The groups that the guard has moved this process into become the roots. This
	// holds for this thread and for what it starts.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare the cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("set the hostname: %w", err)
	}
	if err := mountAll(s); err != nil {
		return err
	}
	return configureNetwork(s)
}

// mountAll mounts what differs from this machine's files.
func mountAll(s setup) error {
	groups, err := hierarchies() // before /proc and /sys are mounted anew
	if err != nil {
		return err
	}
	state, logs := filepath.Join(s.Dir, stateDir), filepath.Join(s.Dir, logsDir)
	for _, dir := range []string{filepath.Join(state, "lib"), filepath.Join(state, "files"), logs} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	mounts := []struct {
		source, target, kind string
		flags                uintptr
		options              string
	}{
		// First nothing reaches the mounts outside, then those inside may be shared
		// with containers.
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"", "/", "", unix.MS_REC | unix.MS_SHARED, ""},
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"tmpfs", "/sys/fs/cgroup", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "mode=755"},
		{filepath.Join(state, "lib"), "/var/lib", "", unix.MS_BIND, ""},
		{logs, "/var/log", "", unix.MS_BIND, ""},
		// Last, as the folders above may be below.
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	}
	for _, m := range mounts {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.options); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.source, m.target, err)
		}
	}
	for _, g := range groups {
		dir := filepath.Join("/sys/fs/cgroup", g.name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("cgroup", dir, "cgroup", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, g.options); err != nil {
			return fmt.Errorf("mount the control groups %s: %w", g.options, err)
		}
	}
	return replaceFiles(filepath.Join(state, "files"), s.Files)
}

// replaceFiles mounts files over others.
func replaceFiles(dir string, files map[string]string) error {
	n := 0
	for path, content := range files {
		n++
		file := filepath.Join(dir, fmt.Sprint(n))
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(file, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount a file on %s: %w", path, err)
		}
	}
	return nil
}

// configureNetwork configures the interfaces.
func configureNetwork(s setup) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(machineLink)
	if err != nil {
		return err
	}
	address := &netlink.Addr{IPNet: &net.IPNet{IP: s.Network.Machine.Addr().AsSlice(), Mask: net.CIDRMask(s.Network.Machine.Bits(), 32)}}
	if err := netlink.AddrAdd(link, address); err != nil {
		return fmt.Errorf("add %v: %w", address, err)
	}
	for _, link := range []netlink.Link{lo, link} {
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up %s: %w", link.Attrs().Name, err)
		}
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: s.Network.Host.AsSlice()}); err != nil {
		return fmt.Errorf("add the default route: %w", err)
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o600)
}

// serve starts the programs that are asked for and says how they end. One goroutine
// does so on the main thread, as the cgroup namespace is that of this thread.
func serve(in *json.Decoder, answers *json.Encoder) error {
	type ended struct {
		pid    int
		status syscall.WaitStatus
	}
	requests, ends, failed := make(chan request), make(chan ended), make(chan error)
	go func() {
		for {
			var r request
			if err := in.Decode(&r); err != nil {
				failed <- fmt.Errorf("read a request: %w", err)
				return
			}
			requests <- r
		}
	}()
	// As the first process, this one is the parent of every orphan.
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	go func() {
		for {
			var e ended
			var err error
			e.pid, err = syscall.Wait4(-1, &e.status, 0, nil)
			switch {
			case err == nil:
				ends <- e
			case errors.Is(err, syscall.ECHILD):
				<-children
			}
		}
	}()
	ids := make(map[int]int) // requests by process
	for {
		select {
		case err := <-failed:
			return err
		case r := <-requests:
			if r.Command == nil {
				for pid, id := range ids {
					if id == r.ID {
						_ = unix.Kill(pid, r.Signal) // fails if it has ended
					}
				}
				continue
			}
			pid, err := fork(*r.Command)
			if err != nil {
				if err := answers.Encode(answer{ID: r.ID, Error: err.Error()}); err != nil {
					return err
				}
				continue
			}
			ids[pid] = r.ID
		case e := <-ends:
			id, ok := ids[e.pid]
			if !ok {
				continue
			}
			delete(ids, e.pid)
			if err := answers.Encode(answer{ID: id, Status: &e.status}); err != nil {
				return err
			}
		}
	}
}

// fork starts a program.
func fork(c Command) (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	log, err := os.OpenFile(c.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	pid, err := syscall.ForkExec(c.Args[0], c.Args, &syscall.ProcAttr{
		Dir: "/", Env: c.Env,
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start: %w", err)
	}
	return pid, nil
}
