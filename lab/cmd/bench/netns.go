// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"

	"github.com/vishvananda/netlink"
)

// namespaced says, to the process that is started in it, that the namespace is
// there.
const namespaced = "BENCH_IN_NAMESPACE"

func inNamespace() bool { return os.Getenv(namespaced) != "" }

// enterNamespace runs this command again in a network namespace of its own. No
// traffic of the bench leaves it, and none from outside disturbs it.
func enterNamespace() error {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...) //nolint:gosec // this command again, as it was called
	cmd.Env = append(os.Environ(), namespaced+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	return cmd.Run()
}

// setUpNetwork gives the namespace what tsnet needs: loopback, and one interface
// more that is up and has a default route. It leads nowhere.
func setUpNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "bench0"}, PeerName: "bench1"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("adding a pair of interfaces: %w", err)
	}
	peer, err := netlink.LinkByName("bench1")
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
	// By way of a neighbour that is not there.
	return netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Gw: net.IPv4(192, 0, 2, 254)})
}
