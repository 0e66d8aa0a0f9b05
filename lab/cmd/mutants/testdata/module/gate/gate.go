// SPDX-License-Identifier: Apache-2.0

// Package gate has what mutants are made of.
package gate

import (
	"errors"
	"strings"
	"time"
)

// Days are those on which the gate is open.
var Days = []time.Weekday{time.Sunday}

// Open is how many they are.
var Open = len(Days)

// Denied are names that may not pass.
var Denied = []string{"root"}

var _ = strings.ToUpper("unused")

// Visitor is somebody at the gate.
type Visitor struct {
	Name   string
	Groups []string
}

// Check returns an error unless v may pass.
func Check(v Visitor) error {
	if v.Name == "" || strings.HasPrefix(v.Name, "system:") {
		return errors.New("no such visitor")
	}
	for _, name := range Denied {
		if v.Name == name {
			return errors.New("denied")
		}
	}
	return nil
}

// Enter returns a visitor, and how often it has been here before.
func Enter(name string, before map[string]int) (v *Visitor, times int) {
	times, known := before[name]
	defer func() { before[name]++ }()
	if !known {
		return &Visitor{Name: name}, 0
	}
	return &Visitor{Name: name, Groups: []string{"known"}}, times
}

// Kind returns the kind of a day.
func Kind(day string, open bool) string {
	switch day {
	case "saturday", "sunday":
		return "weekend"
	}
	switch {
	case open:
		return "open"
	}
	return ""
}

// Wait counts n down. It never ends without a statement of it.
func (Visitor) Wait(_ int, n int) {
	for n > 0 {
		n--
	}
}

// First returns the first of all that keep wants.
func First[T any](keep func(T) bool, all ...T) (first T, ok bool) {
	for _, one := range all {
		if keep(one) {
			return one, true
		}
	}
	return first, false
}

// Unused is met by no test.
func Unused(n int) int {
	return n + 1
}

// Cached says the same with and without its cache.
func Cached(n int, cache map[int]int) int {
	if v, ok := cache[n]; ok {
		return v
	}
	return 2 * n
}
