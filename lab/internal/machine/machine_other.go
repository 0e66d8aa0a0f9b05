// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package machine

import (
	"context"
	"errors"
	"runtime"
	"syscall"
)

// Supported returns why machines cannot run here.
func Supported() error { return errors.New("needs Linux; this is " + runtime.GOOS) }

// Machine is a running machine.
type Machine struct{ Network Network }

// Start returns the error of [Supported].
func Start(context.Context, Config) (*Machine, error) { return nil, Supported() }

// Stop does nothing.
func (*Machine) Stop() error { return nil }

// Start returns the error of [Supported].
func (*Machine) Start(Command) (*Process, error) { return nil, Supported() }

// Run returns the error of [Supported].
func (*Machine) Run(context.Context, Command) error { return Supported() }

// Signal does nothing.
func (*Machine) Signal(*Process, syscall.Signal) {}
