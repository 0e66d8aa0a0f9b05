// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/machine"
)

// Name is the name of the node.
const Name = "lab"

// startTimeout is how long each step may take. All of them take about six seconds on
// an idle machine.
const startTimeout = 2 * time.Minute

// socket is where containerd listens, on the node.
const socket = "/run/containerd/containerd.sock"

// Config says how to run a node.
type Config struct {
	// Dir is the folder for everything that the node writes. It is created if
	// necessary. When the node stops, the logs stay.
	Dir string
}

// Node is a running node.
type Node struct {
	dir     string
	parts   parts
	machine *machine.Machine
	imports atomic.Int32
	daemons []*daemon
}

// daemon is a program that runs as long as the node.
type daemon struct {
	name    string
	process *machine.Process
}

// Start starts a machine with containerd on it. It becomes a node with [Node.Join].
// If Start fails, the error names the part that failed, the reason and its log.
func Start(ctx context.Context, cfg Config) (_ *Node, err error) {
	n := &Node{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start node: %w", err), n.Stop())
		}
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, errors.New("timed out"))
	defer cancel()
	if n.dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, err
	}
	if n.parts, err = findParts(); err != nil {
		return nil, err
	}
	n.machine, err = machine.Start(ctx, machine.Config{Name: Name, Dir: n.dir, Files: kernelSettings})
	if err != nil {
		return nil, err
	}
	if err := n.writeFiles(map[string]string{
		"containerd.toml":     n.containerdConfig(),
		"cni/10-lab.conflist": n.cniConfig(),
	}); err != nil {
		return nil, err
	}
	images := n.path("images.tar")
	if err := writeImages(images, n.parts); err != nil {
		return nil, err
	}
	if err := n.startDaemon("containerd", n.parts.path("usr/bin/containerd"), "--config", n.path("containerd.toml")); err != nil {
		return nil, err
	}
	if err := n.poll(ctx, "containerd answers", func() error { return n.ctr(ctx, "version") }); err != nil {
		return nil, err
	}
	if err := n.Import(ctx, images); err != nil {
		return nil, err
	}
	return n, os.Remove(images)
}

// Stop ends everything on the node and returns when nothing but its logs is left.
func (n *Node) Stop() error {
	if n.machine == nil {
		return nil
	}
	return n.machine.Stop()
}

// Host returns the address of this machine as the node and its pods reach it.
func (n *Node) Host() netip.Addr { return n.machine.Network.Host }

// Address returns the address of the node.
func (n *Node) Address() netip.Addr { return n.machine.Network.Machine.Addr() }

// Log returns the path of the log of the component of that name.
func (n *Node) Log(name string) string { return n.path(name + ".log") }

// Import adds the images in a file to the node, in the format that "docker load" reads
// or in that of OCI.
func (n *Node) Import(ctx context.Context, file string) error {
	file, err := filepath.Abs(file)
	if err != nil {
		return fmt.Errorf("import images: %w", err)
	}
	if err := n.ctr(ctx, "--namespace", "k8s.io", "images", "import", "--snapshotter", "overlayfs", file); err != nil {
		return fmt.Errorf("import images of %s: %w", file, err)
	}
	return nil
}

// ctr runs containerd's client.
func (n *Node) ctr(ctx context.Context, args ...string) error {
	return n.machine.Run(ctx, machine.Command{
		Args: append([]string{n.parts.path("usr/bin/ctr"), "--address", socket}, args...),
		Env:  n.parts.environment(),
		Log:  n.Log(fmt.Sprintf("ctr-%d", n.imports.Add(1))),
	})
}

// startDaemon starts a program that runs as long as the node.
func (n *Node) startDaemon(name string, args ...string) error {
	p, err := n.machine.Start(machine.Command{Args: args, Env: n.parts.environment(), Log: n.Log(name)})
	if err != nil {
		return err
	}
	n.daemons = append(n.daemons, &daemon{name, p})
	return nil
}

// alive returns an error if a daemon has ended.
func (n *Node) alive() error {
	for _, d := range n.daemons {
		select {
		case <-d.process.Done():
			return fmt.Errorf("%s has ended: %w", d.name, d.process.Err())
		default:
		}
	}
	return nil
}

// poll calls f until it returns nil. It fails if a daemon or ctx ends.
func (n *Node) poll(ctx context.Context, what string, f func() error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		if dead := n.alive(); dead != nil {
			return fmt.Errorf("wait until %s: %w", what, dead)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w: %w (logs: %s)", what, context.Cause(ctx), err, n.dir)
		}
	}
}

// path returns the path of a file in the node's folder.
func (n *Node) path(name string) string { return filepath.Join(n.dir, name) }

// writeFiles writes files in the node's folder.
func (n *Node) writeFiles(files map[string]string) error {
	for name, content := range files {
		if err := os.MkdirAll(filepath.Dir(n.path(name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(n.path(name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}
