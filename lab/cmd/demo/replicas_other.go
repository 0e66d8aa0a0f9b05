// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package main

import (
	"context"
	"errors"
)

func becameReplica() bool { return false }

func startReplicas(context.Context, string, bool) error {
	return errors.New("the demo with two replicas puts a machine on the tailnet in namespaces of its own: run it as root on Linux")
}
