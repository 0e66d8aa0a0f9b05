// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The first arguments of guard and init.
const (
	guardName = "lab-machine-guard"
	initName  = "lab-machine-init"
)

// This program is guard or init if it was started as such.
func init() {
	if len(os.Args) != 2 {
		return
	}
	run := map[string]func(setup) error{guardName: guard, initName: initProcess}[os.Args[0]]
	if run == nil {
		return
	}
	// The kernel kills the init when the thread ends that has started it. And the
	// cgroup namespace of the init is that of one thread.
	runtime.LockOSThread()
	var s setup
	err := json.Unmarshal([]byte(os.Args[1]), &s)
	if err == nil {
		err = run(s)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		os.Exit(1)
	}
	os.Exit(0)
}

// guard starts the init, waits until it or the process that wants the machine ends,
// and removes what is left.
func guard(s setup) (err error) {
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	lifeline := os.NewFile(3, "lifeline")
	control := os.NewFile(4, "control")
	syscall.CloseOnExec(5) // holds the slot until this process ends

	if err := cleanUp(s); err != nil { // what a killed guard has left
		return err
	}
	defer func() { err = errors.Join(err, cleanUp(s)) }()

	if err := createGroups(slotName(s.Slot)); err != nil {
		return err
	}
	hold, proceed, err := os.Pipe()
	if err != nil {
		return err
	}
	child := &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       []string{initName, s.encode()},
		Env:        os.Environ(),
		Stdout:     os.Stdout,
		Stderr:     os.Stderr,
		ExtraFiles: []*os.File{hold, control},
		SysProcAttr: &syscall.SysProcAttr{
			Setsid:     true,
			Pdeathsig:  unix.SIGKILL,
			Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		},
	}
	if err := child.Start(); err != nil {
		return fmt.Errorf("start the init: %w", err)
	}
	// Only the init answers: its end ends the connection.
	_ = hold.Close()
	_ = control.Close()
	defer func() {
		_ = child.Process.Kill() // fails if it has ended
		_ = child.Wait()         // it never ends well
	}()
	if err := enterGroups(slotName(s.Slot), child.Process.Pid); err != nil {
		return err
	}
	if err := connect(s, child.Process.Pid); err != nil {
		return err
	}
	if _, err := proceed.Write([]byte{1}); err != nil {
		return fmt.Errorf("the init has ended: %w", err)
	}
	_ = proceed.Close()

	gone := make(chan struct{}, 2)
	go func() {
		_, _ = io.Copy(io.Discard, lifeline) // until it is closed
		gone <- struct{}{}
	}()
	go func() {
		// Do not reap it here: its process ID must not be used again before Kill.
		_ = unix.Waitid(unix.P_PID, child.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		gone <- struct{}{}
	}()
	<-gone
	return nil
}

// hostLink is the name of this machine's end of the pair of interfaces.
func hostLink(slot int) string { return slotName(slot) }

// machineLink is the name of the other end.
const machineLink = "eth0"

// connect connects this network namespace with that of the init.
func connect(s setup, pid int) error {
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: hostLink(s.Slot)},
		PeerName:      machineLink,
		PeerNamespace: netlink.NsPid(pid),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add a pair of interfaces: %w", err)
	}
	link, err := netlink.LinkByName(hostLink(s.Slot))
	if err != nil {
		return err
	}
	host := &netlink.Addr{IPNet: &net.IPNet{IP: s.Network.Host.AsSlice(), Mask: net.CIDRMask(s.Network.Machine.Bits(), 32)}}
	if err := netlink.AddrAdd(link, host); err != nil {
		return fmt.Errorf("add %v: %w", host, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", link.Attrs().Name, err)
	}
	route := &netlink.Route{
		LinkIndex: link.Attrs().Index,
		Dst:       &net.IPNet{IP: s.Network.Containers.Addr().AsSlice(), Mask: net.CIDRMask(s.Network.Containers.Bits(), 32)},
		Gw:        s.Network.Machine.Addr().AsSlice(),
	}
	if err := netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("add route to %v: %w", s.Network.Containers, err)
	}
	return nil
}

// cleanUp removes what stays when the init has ended.
func cleanUp(s setup) error {
	var errs []error
	// The kernel removes the interfaces with the network namespace, a moment later.
	if link, err := netlink.LinkByName(hostLink(s.Slot)); err == nil {
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove interface %s: %w", hostLink(s.Slot), err))
		}
	} else if _, missing := errors.AsType[netlink.LinkNotFoundError](err); !missing {
		errs = append(errs, err)
	}
	errs = append(errs, removeGroups(slotName(s.Slot)))
	errs = append(errs, os.RemoveAll(filepath.Join(s.Dir, stateDir)))
	return errors.Join(errs...)
}
