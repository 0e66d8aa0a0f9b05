// SPDX-License-Identifier: Apache-2.0

// Package netns runs programs in a network namespace of their own, isolated from all
// other traffic.
package netns

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"

	"github.com/vishvananda/netlink"
)

// inside tells the started process that it runs in the namespace.
const inside = "LAB_IN_NETWORK_NAMESPACE"

// Inside reports whether this process was started by a [Command].
func Inside() bool { return os.Getenv(inside) != "" }

// Command returns a command that runs this program again, with other arguments, in a
// network namespace that ends with it. Without root, the process is root in a user
// namespace of its own.
func Command(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	return cmd
}

// SetUp gives the namespace what tailnet nodes need: loopback, and another interface
// that is up and has a default route, which leads nowhere.
func SetUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "lab0"}, PeerName: "lab1"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("adding a pair of interfaces: %w", err)
	}
	peer, err := netlink.LinkByName("lab1")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("192.0.2.1/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(veth, addr); err != nil {
		return err
	}
	for _, link := range []netlink.Link{lo, veth, peer} {
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bringing up %s: %w", link.Attrs().Name, err)
		}
	}
	// The gateway does not exist.
	return netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Gw: net.IPv4(192, 0, 2, 254)})
}
