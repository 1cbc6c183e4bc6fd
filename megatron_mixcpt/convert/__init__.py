"""Hugging Face in and out: conversion, export, averages."""
